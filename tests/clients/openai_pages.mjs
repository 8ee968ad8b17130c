// The openai client's first pages: a chat, its message sent back, a stream, a text completion, an error's code.
import OpenAI from "openai";

const [url, key, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const question = { role: "user", content: "the film" };
const asked = { model, max_tokens: 4 };

const answer = await client.chat.completions.create({ ...asked, messages: [question] });
const message = answer.choices[0].message;
console.log(message.content);
const empty = { annotations: [], audio: null, function_call: null, tool_calls: null };
for (const again of [message, { ...message, ...empty }]) {
  await client.chat.completions.create({ ...asked, messages: [question, again, question] });
}
const stream = client.chat.completions.stream({ ...asked, messages: [{ role: "developer", content: "short" }, question] });
console.log(await stream.finalContent());
const streamed = (await stream.finalChatCompletion()).choices[0].message;
await client.chat.completions.create({ ...asked, messages: [question, streamed, question] });
const text = await client.completions.create({ ...asked, prompt: "the film" });
console.log(text.choices[0].text);
await client.chat.completions
  .create({ ...asked, messages: [{ role: "user", content: "the film ".repeat(60) }] })
  .catch((error) => console.log(error.code, error.param));
