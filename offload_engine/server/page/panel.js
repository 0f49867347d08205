// One answer: its text, its masks, its counters and its experts. Whatever the model says is set as text, never as HTML.

import { boxed, bytes, number, percent } from "./format.js";
import { HeatMap } from "./heatmap.js";

const COUNTERS = [
  ["tokens", "tokens/s"],
  ["steps", "steps"],
  ["unique", "experts per layer"],
  ["hits", "hit rate"],
  ["moved", "moved"],
  ["stalled", "stalled"],
];

export class Panel {
  constructor(title) {
    this.node = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.node.querySelector(`.${name}`);
    this.node.querySelector("h2").textContent = title;
    this.node.setAttribute("aria-label", title);
    this.heat = new HeatMap(this.part("heat"));
    this.values = {};
    for (const [name, label] of COUNTERS) {
      const [pair, term, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      term.textContent = label;
      value.textContent = "–";
      value.dataset.counter = name;
      pair.append(term, value);
      this.part("counters").append(pair);
      this.values[name] = value;
    }
    this.text = "";
    this.decided = 0;
    this.uses = []; // per layer: how many steps used which expert
    this.steps = 0;
    this.end = null;
    this.status("waiting");
  }

  status(text) {
    this.part("status").textContent = text;
  }

  take(name, data) {
    this[`on_${name}`](data);
  }

  on_begin({ layers, experts, block_length: length }) {
    this.uses = layers.map(() => new Map());
    this.heat.shape(layers, experts);
    this.cells(Array(length).fill(null), []);
  }

  on_step(data) {
    this.decided += data.accepted.length;
    const masked = data.cells.filter((cell) => cell === null).length;
    this.status(`block ${data.block + 1}, step ${data.step}: ${masked} masked`);
    this.cells(data.cells, data.accepted);
    this.count(data.counters, this.decided / data.counters.wall_seconds);
    this.steps += 1;
    this.experts(data.experts, `Block ${data.block + 1}, step ${data.step}`);
  }

  on_block(data) {
    this.text += data.text;
    this.part("done").textContent = this.text;
    this.part("block").replaceChildren();
  }

  on_end(data) {
    this.end = data;
    this.part("done").textContent = data.text;
    this.part("block").replaceChildren();
    this.count(data.counters, data.usage.completion_tokens / data.counters.wall_seconds);
    const shares = this.uses.map((layer) => [...layer].map(([expert, times]) => [expert, times / this.steps]));
    this.heat.show(this.heat.held, shares, "The whole answer; tall bars were used in most of its steps", true);
    const answer = boxed(data.text);
    this.part("boxed").hidden = answer === null;
    this.part("boxed").querySelector("strong").textContent = answer ?? "";
    const cut = data.stop_reason ? `, cut short by the ${data.stop_reason}` : data.finish_reason === "length" ? ", cut at its longest" : "";
    this.status(`${data.usage.completion_tokens} tokens in ${data.counters.denoise_steps} steps${cut}`);
  }

  on_error({ error }) {
    this.status(error.message);
  }

  stopped() {
    this.status("stopped");
    for (const cell of this.node.querySelectorAll(".cell.new")) cell.classList.remove("new");
  }

  cells(texts, accepted) {
    const sure = new Map(accepted);
    const nodes = texts.map((text, place) => {
      const cell = document.createElement("span");
      cell.className = "cell";
      if (text === null) {
        cell.classList.add("masked");
      } else if (text === "") {
        cell.classList.add("end");
      } else {
        cell.textContent = text.replaceAll("\n", "⏎");
        if (sure.has(place)) {
          const share = Math.floor(sure.get(place) * 100);
          cell.classList.add("new");
          cell.dataset.sure = share;
          cell.style.setProperty("--sure", share);
          cell.title = `accepted with a confidence of ${share} %`;
        }
      }
      return cell;
    });
    this.part("block").replaceChildren(...nodes);
  }

  experts(experts, what) {
    if (!experts) return;
    experts.used.forEach((layer, row) => {
      const uses = this.uses[row];
      for (const expert of layer) uses.set(expert, (uses.get(expert) ?? 0) + 1);
    });
    this.heat.show(experts.held, experts.used.map((layer) => layer.map((expert) => [expert, 1])), what);
  }

  count(counters, tokensPerSecond) {
    const shown = {
      tokens: number(tokensPerSecond, tokensPerSecond < 10 ? 1 : 0),
      steps: String(counters.denoise_steps),
      unique: number(counters.unique_experts),
      hits: percent(counters.hit_rate),
      moved: bytes(counters.bytes_moved),
      stalled: percent(counters.stall_share),
    };
    for (const [name, text] of Object.entries(shown)) this.values[name].textContent = text;
  }
}
