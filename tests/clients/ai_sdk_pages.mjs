// The AI SDK's first pages: generateText, streamText, and a conversation whose answer is sent back.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [url, key, name] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "mine", baseURL: url, apiKey: key })(name);
const asked = { model, maxOutputTokens: 4, maxRetries: 0 };

const first = await generateText({ ...asked, system: "short", prompt: "the film" });
console.log(first.text);
const question = { role: "user", content: "the film" };
const second = await generateText({ ...asked, messages: [question, ...first.response.messages, question] });
console.log(second.text);
const stream = streamText({ ...asked, prompt: "the film" });
let text = "";
for await (const part of stream.textStream) text += part;
console.log(text);
