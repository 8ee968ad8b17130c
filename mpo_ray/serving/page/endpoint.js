// What the page asks of the endpoint. It knows nothing of the document.

/** A refusal or a failure, in words for the person at the page. */
export class EndpointError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** What is served: {name, objectives, hasReference, hasChatTemplate}. */
export async function readModels(key) {
  const answer = await (await send("v1/models", { key })).json();
  const [name, ...others] = answer.data.map((model) => model.id);
  const policies = others.map((id) => id.slice(name.length + 1));
  const objectives = policies.filter((policy) => policy !== "reference");
  const hasChatTemplate = answer.data[0].has_chat_template;
  return { name, objectives, hasReference: objectives.length < policies.length, hasChatTemplate };
}

/** The weights that the endpoint decodes with where none are given, by objective: those of an answer of no token. */
export async function readOwnWeights(key, name) {
  const body = { model: name, prompt: "a", echo: true, max_tokens: 0 };
  const answer = await (await send("v1/completions", { key, body })).json();
  return answer.choices[0].mixture.weights;
}

/** The chunks of a streamed answer, as they come. */
export async function* readStream(path, { key, body, signal }) {
  const usage = { include_usage: true, continuous_usage_stats: true };
  const response = await send(path, { key, signal, body: { ...body, stream: true, stream_options: usage } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(unreachable);
      if (done) throw new EndpointError("The answer broke off before its end.");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new EndpointError(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // where it has ended there is nothing to cancel
  }
}

async function send(path, { key, body, signal }) {
  if (!/^[\x21-\x7e]*$/.test(key)) throw new EndpointError("The API key has a character that no key has.", 401);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, credentials: "omit", cache: "no-store" };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, options).catch(unreachable);
  if (!response.ok) throw new EndpointError(await reason(response, key), response.status);
  return response;
}

async function reason(response, key) {
  if (response.status === 401) {
    return key ? "The API key is wrong." : "This endpoint asks for an API key: enter yours.";
  }
  const said = await response.json().catch(() => null);
  return said?.error?.message ?? `The endpoint answered with status ${response.status}.`;
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new EndpointError("The endpoint cannot be reached.");
}
