// Numbers as people read them.

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 999.5 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  const digits = power === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.max(count, 1))));
  return `${count.toFixed(digits)} ${units[power]}`;
}

export function number(value, digits = 1) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${number(share * 100)} %`;
}

// What stands in the last \boxed{…} of a text, braces within it balanced; null without one.
export function boxed(text) {
  const start = text.lastIndexOf("\\boxed{");
  if (start < 0) return null;
  let depth = 0;
  for (let place = start + 6; place < text.length; place += 1) {
    if (text[place] === "{") depth += 1;
    if (text[place] === "}" && (depth -= 1) === 0) return text.slice(start + 7, place);
  }
  return null;
}
