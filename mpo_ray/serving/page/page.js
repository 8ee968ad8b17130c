// The page: its form, and an answer of everything that is served, side by side. All text goes in as text, never as HTML.

import { EndpointError, readModels, readOwnWeights, readStream } from "./endpoint.js";

const TONES = 8;
const find = (id) => document.getElementById(id);
const key = () => find("key").value.trim();

let served = null; // {name, objectives, hasReference, hasChatTemplate, own}, once the endpoint has said it
let connecting = null; // the promise of that, while it is being asked
let running = null; // the AbortController of the answers that are being made

/** Ask what is served, unless it is known, and make the sliders; says whether it worked. */
function connected() {
  connecting ??= served ? Promise.resolve(true) : connect();
  return connecting.finally(() => (connecting = null));
}

async function connect() {
  try {
    const found = await readModels(key());
    found.own = await readOwnWeights(key(), found.name);
    served = found;
    find("model").textContent = served.name;
    document.title = `${served.name} · mpo_ray`;
    find("kind").value = served.hasChatTemplate ? "chat" : "completions";
    find("kind").querySelector("[value=chat]").disabled = !served.hasChatTemplate;
    makeSliders();
    say("");
    return true;
  } catch (error) {
    say(words(error), true);
    if (error.status === 401) find("key").focus();
    return false;
  }
}

function makeSliders() {
  const made = served.objectives.map((objective, number) => {
    const slider = find("slider").content.cloneNode(true).firstElementChild;
    const input = slider.querySelector("input");
    slider.classList.add(tone(number));
    slider.querySelector("label").textContent = objective;
    slider.querySelector("label").htmlFor = input.id = `weight-${number}`;
    slider.querySelector("output").htmlFor = input.id;
    input.addEventListener("input", showWeights);
    return slider;
  });
  find("sliders").replaceChildren(...made);
  find("simplex").replaceChildren(
    ...served.objectives.map((_, number) => {
      const part = document.createElement("div");
      part.classList.add(tone(number));
      return part;
    }),
  );
  setOwnWeights();
}

const sliders = () => [...find("sliders").querySelectorAll("input")];
const tone = (number) => `tone-${number % TONES}`;

function setOwnWeights() {
  sliders().forEach((slider, number) => {
    slider.value = served.own[served.objectives[number]];
  });
  showWeights();
}

/** λ by objective: the sliders over their sum. null where all are at 0. */
function weights() {
  const values = sliders().map((slider) => slider.valueAsNumber);
  const total = values.reduce((sum, value) => sum + value, 0);
  if (!total) return null;
  return Object.fromEntries(served.objectives.map((objective, number) => [objective, values[number] / total]));
}

function showWeights() {
  const wanted = weights();
  const outputs = find("sliders").querySelectorAll("output");
  served.objectives.forEach((objective, number) => {
    sliders()[number].style.setProperty("--at", sliders()[number].value);
    outputs[number].textContent = wanted ? wanted[objective].toFixed(3) : "–";
    find("simplex").children[number].style.flexGrow = wanted ? wanted[objective] : 0;
  });
  find("ask").disabled = !wanted;
  say(wanted ? "" : "All weights are 0: give one objective some.", !wanted);
}

/** What the form asks of every model. Fields that are empty are left out: the endpoint has its own values for them. */
function request() {
  const body = {};
  for (const [field, id] of [["max_tokens", "max-tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    const value = find(id).valueAsNumber;
    if (!Number.isNaN(value)) body[field] = value;
  }
  const prompt = find("prompt").value;
  if (find("kind").value === "chat") {
    return { path: "v1/chat/completions", prompt, body: { ...body, messages: [{ role: "user", content: prompt }] } };
  }
  return { path: "v1/completions", prompt, body: { ...body, prompt } };
}

/** Everything that answers: the mixture, each policy, the reference. */
function candidates() {
  const alone = (policy) => ({ title: policy, model: `${served.name}/${policy}` });
  const reference = { ...alone("reference"), says: "before any objective" };
  const policies = served.objectives.map((one, number) => ({ ...alone(one), says: "this objective alone", number }));
  const shares = Object.entries(weights()).map(([objective, share]) => `${objective}\u00a0${share.toFixed(3)}`);
  const mixture = { title: "mixture", model: served.name, says: shares.join("\u00a0· "), weights: weights() };
  return [mixture, ...policies, ...(served.hasReference ? [reference] : [])];
}

async function answerAll() {
  running?.abort();
  const mine = (running = new AbortController());
  if (!(await connected())) return;
  const asked = request();
  busy(true);
  say("");
  const answers = candidates().map((candidate) => ({ candidate, card: makeCard(candidate, asked) }));
  find("answers").replaceChildren(...answers.map(({ card }) => card));
  showAnswers();
  const refusals = await Promise.all(answers.map(({ candidate, card }) => answer(candidate, card, asked, mine.signal)));
  if (running !== mine) return;
  busy(false);
  if (refusals[0] && refusals.every((refusal) => refusal === refusals[0])) {
    find("answers").replaceChildren();
    say(refusals[0], true);
    find("status").scrollIntoView({ block: "nearest" });
  } else {
    refusals.forEach((refusal, number) => refusal && sayIn(answers[number].card, refusal));
  }
}

/** Bring the answers into view where they begin far down, as on a phone. */
function showAnswers() {
  if (find("answers").getBoundingClientRect().top > 0.7 * innerHeight) find("answers").scrollIntoView();
}

function makeCard(candidate, { path, prompt }) {
  const card = find("answer").content.cloneNode(true).firstElementChild;
  card.dataset.model = candidate.title;
  card.classList.add("running");
  card.classList.toggle("mixture", Boolean(candidate.weights));
  if (candidate.number !== undefined) card.classList.add(tone(candidate.number));
  card.querySelector("h2").textContent = candidate.title;
  card.querySelector(".says").textContent = candidate.says;
  card.querySelector(".prompt").textContent = path === "v1/completions" ? prompt : "";
  return card;
}

/** Let one model answer into its card, piece by piece. Returns why it said nothing, where it was refused. */
async function answer(candidate, card, { path, body }, signal) {
  const put = (place, text) => (card.querySelector(place).textContent = text);
  const asked = { ...body, model: candidate.model };
  if (candidate.weights) asked.mixture = { weights: candidate.weights };
  try {
    for await (const chunk of readStream(path, { key: key(), body: asked, signal })) {
      if (chunk.usage) put(".tokens", String(chunk.usage.completion_tokens));
      for (const choice of chunk.choices) {
        card.querySelector(".completion").append(choice.text ?? choice.delta?.content ?? "");
        if (!choice.finish_reason) continue;
        put(".log-z", number(choice.mixture.log_z));
        put(".end", choice.finish_reason === "length" ? "max tokens" : "its end");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      put(".end", "stop");
    } else {
      put(".end", "error");
      if (!card.querySelector(".completion").textContent) return words(error);
      sayIn(card, words(error));
    }
  } finally {
    card.classList.remove("running");
  }
  return "";
}

function sayIn(card, text) {
  card.querySelector(".error").textContent = text;
  card.querySelector(".error").hidden = false;
}

/** Three digits, with a true minus, and no minus before nothing. */
function number(value) {
  if (value === null) return "–";
  return value.toFixed(3).replace(/^-(?=0\.000$)/, "").replace("-", "−");
}

function busy(is) {
  find("stop").hidden = !is;
  find("ask").textContent = is ? "Answer again" : "Answer";
}

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

function words(error) {
  if (error instanceof EndpointError) return error.message;
  console.error(error);
  return "Something on this page went wrong; the browser’s console has it.";
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  answerAll();
});
find("stop").addEventListener("click", () => running?.abort());
find("reset").addEventListener("click", () => served && setOwnWeights());
find("key").addEventListener("change", connected);
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").click(); // a disabled button does nothing
});
connected();
