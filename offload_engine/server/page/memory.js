// The memory plan as a bar: its parts, the measured peak, the limit.

import { bytes } from "./format.js";

const PARTS = [
  ["weights", "weights"],
  ["kv_cache", "KV cache"],
  ["workspace", "workspace"],
  ["staging", "staging"],
  ["runtime", "runtime"],
  ["expert_slots", "expert slots"],
];

export function showMemory(node, { plan, stats }) {
  const peak = stats.measured_peak_bytes;
  const scale = Math.min(plan.budget, Math.max(plan.total, peak) * 1.15);
  const share = (count) => `${((100 * count) / scale).toFixed(3)}%`;
  const parts = PARTS.filter(([name]) => plan[name] > 0).map(([name, label]) => {
    const part = document.createElement("span");
    part.className = name;
    part.style.width = share(plan[name]);
    part.title = `${label}: ${bytes(plan[name])}`;
    return part;
  });
  if (peak > 0) {
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.style.left = share(peak);
    mark.title = `peak so far: ${bytes(peak)}`;
    parts.push(mark);
  }
  const bar = node.querySelector(".bar");
  bar.replaceChildren(...parts);
  const used = peak > 0 ? `used ${bytes(peak)} at most · ` : "";
  const text = `${used}planned ${bytes(plan.total)} · limit ${bytes(plan.budget)}`;
  node.querySelector("p").textContent = text;
  const listed = PARTS.filter(([name]) => plan[name] > 0).map(([name, label]) => `${label} ${bytes(plan[name])}`);
  bar.setAttribute("aria-label", `Memory: ${text}. ${listed.join(", ")}.`);
  node.hidden = false;
}
