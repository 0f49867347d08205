// The form, and what it sets in motion.

import { boxed, number } from "./format.js";
import { showMemory } from "./memory.js";
import { Panel } from "./panel.js";
import { Refused, denoise, statistics, useKey } from "./stream.js";

const EXAMPLES = [
  "A box holds 12 pencils. How many pencils are in 7 boxes?",
  "Eva is 13 years old. How old will she be in 27 years?",
  "What is 37 + 58?",
];
const PACE = 160; // milliseconds a step is shown for at least: a small model takes two of them
const STEP_BY_STEP = { steps: 8, threshold: 1 };

const at = (id) => document.getElementById(id);
let running = null; // the AbortController of what is under way

function routing() {
  return document.querySelector("input[name=routing]:checked").value;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function tell(error) {
  at("key-form").hidden = !(error instanceof Refused && error.status === 401);
  if (at("key-form").hidden) notice(error instanceof Refused ? error.message : "The server can't be reached.");
  else at("key").focus();
}

async function refresh() {
  try {
    const found = await statistics();
    at("model").textContent = found.model;
    showMemory(at("memory"), found);
  } catch (error) {
    tell(error);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

// One answer in `panel`, its steps shown no faster than they can be seen.
async function follow(panel, body, signal) {
  let shownAt = 0;
  for await (const [name, data] of denoise(body, signal)) {
    await pause(Math.max(0, shownAt + PACE - performance.now()), signal);
    if (signal.aborted) return;
    panel.take(name, data);
    if (name === "step" || name === "error") shownAt = performance.now();
  }
}

function jobs() {
  const p = Number(at("p").value);
  const common = {
    messages: [{ role: "user", content: at("prompt").value }],
    ...(at("slowly").checked ? STEP_BY_STEP : {}),
  };
  const all = {
    original: [["Original routing", { ...common, routing: "original" }]],
    dmoe: [[`dMoE, p = ${p.toFixed(2)}`, { ...common, routing: "dmoe", routing_top_p: p }]],
  };
  return routing() === "both" ? [...all.original, ...all.dmoe] : all[routing()];
}

function verdict(panels) {
  const [original, dmoe] = panels.map((panel) => panel.end);
  if (!original || !dmoe) return "";
  const [before, after] = [original, dmoe].map((end) => end.counters.unique_experts);
  const saved = `dMoE used ${number(after)} experts per layer where original routing used ${number(before)}: ${number(100 * (1 - after / before), 0)} % fewer`;
  const same = (boxed(original.text) ?? original.text) === (boxed(dmoe.text) ?? dmoe.text);
  return `${saved}, and ${same ? "came to the same answer" : "came to another answer"}.`;
}

async function answer() {
  if (running || !at("prompt").value.trim()) return;
  running = new AbortController();
  const { signal } = running;
  notice("");
  at("verdict").textContent = "";
  at("intro").hidden = true;
  at("go").disabled = true;
  at("stop").disabled = false;
  const work = jobs().map(([title, body]) => [new Panel(title), body]);
  const panels = work.map(([panel]) => panel);
  at("panels").replaceChildren(...panels.map((panel) => panel.node));
  try {
    for (const [panel, body] of work) {
      if (!signal.aborted) await follow(panel, body, signal); // in turn, so that counters are each one's own
    }
  } catch (error) {
    if (!signal.aborted) tell(error);
  }
  for (const panel of panels) if (!panel.end && signal.aborted) panel.stopped();
  if (panels.length > 1) at("verdict").textContent = verdict(panels);
  running = null;
  at("go").disabled = false;
  at("stop").disabled = true;
  await refresh();
}

function stop() {
  running?.abort();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  answer();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    answer();
  }
});
at("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("p").addEventListener("input", () => {
  at("p-value").textContent = Number(at("p").value).toFixed(2);
});
for (const one of document.querySelectorAll("input[name=routing]")) {
  one.addEventListener("change", () => {
    at("p").disabled = routing() === "original";
    at("p").closest("label").toggleAttribute("data-off", at("p").disabled);
  });
}
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  at("key-form").hidden = true;
  refresh();
});
for (const text of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    at("prompt").value = text;
    at("prompt").focus();
  });
  document.querySelector(".examples").append(button);
}
refresh();
