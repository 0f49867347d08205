// Layers × experts: what is used, in memory, on its way. Height tells the states apart as well as colour does.

const GAP = 6;
const LEAST_WIDTH = 2.5;
const GUTTER = 18; // for the layers' numbers

export class HeatMap {
  constructor(figure) {
    this.canvas = figure.querySelector("canvas");
    this.caption = (name) => figure.querySelector(`.${name}`);
    this.figure = figure;
    this.layers = [];
    this.experts = 0;
    this.held = [];
    this.used = [];
    new ResizeObserver(() => this.draw()).observe(figure);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  shape(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    this.show(layers.map(() => ".".repeat(experts)), layers.map(() => []), "");
  }

  // `held`: per layer a sign per expert; `used`: per layer pairs of a used expert and its share of a full bar;
  // `usedAlone`: what is in memory is counted, not drawn.
  show(held, used, what, usedAlone = false) {
    this.held = held;
    this.used = used.map((layer) => new Map(layer));
    this.usedAlone = usedAlone;
    const signs = held.join("");
    const count = (sign) => signs.split(sign).length - 1;
    const usedCount = this.used.reduce((sum, layer) => sum + layer.size, 0);
    const counts = { used: usedCount, resident: count("r"), loading: count("l"), absent: count(".") };
    for (const [name, value] of Object.entries(counts)) this.caption(`${name}-count`).textContent = value;
    this.caption("what").textContent = what;
    this.canvas.setAttribute(
      "aria-label",
      `Experts of ${this.layers.length} layers. ${what}: ${counts.used} used; ${counts.resident} of ${signs.length} in memory, ${counts.loading} loading.`,
    );
    this.draw();
  }

  draw() {
    const width = this.figure.clientWidth - GUTTER;
    if (width <= 0 || !this.experts) return;
    const lines = Math.max(1, Math.ceil((this.experts * LEAST_WIDTH) / width));
    const perLine = Math.ceil(this.experts / lines);
    const rowHeight = this.layers.length * lines <= 8 ? 18 : 8;
    const height = this.layers.length * (lines * (rowHeight + 2) + GAP);
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round((width + GUTTER) * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.figure);
    const colours = Object.fromEntries(["used", "resident", "loading", "absent"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
    const step = width / perLine;
    const wide = Math.max(1, Math.min(step - 0.75, step * 0.8));
    pen.font = `${Math.min(11, rowHeight)}px system-ui, sans-serif`;
    this.layers.forEach((layer, row) => {
      const top = row * (lines * (rowHeight + 2) + GAP);
      pen.fillStyle = style.getPropertyValue("--quiet");
      pen.fillText(layer, 0, top + rowHeight);
      for (let expert = 0; expert < this.experts; expert += 1) {
        const x = GUTTER + (expert % perLine) * step;
        const bottom = top + Math.floor(expert / perLine) * (rowHeight + 2) + rowHeight;
        const state = this.state(row, expert);
        pen.fillStyle = pen.strokeStyle = colours[state];
        if (state === "loading") {
          pen.strokeRect(x + 0.5, bottom - rowHeight + 0.5, Math.max(1, wide - 1), rowHeight - 1);
        } else {
          const share = this.used[row]?.get(expert) ?? 1;
          const tall = { used: Math.max(3, rowHeight * share), resident: rowHeight / 2, absent: 1.5 }[state];
          pen.fillRect(x, bottom - tall, wide, tall);
        }
      }
    });
  }

  state(row, expert) {
    if (this.used[row]?.has(expert)) return "used";
    if (this.usedAlone) return "absent";
    return { r: "resident", l: "loading" }[this.held[row]?.[expert]] ?? "absent";
  }
}
