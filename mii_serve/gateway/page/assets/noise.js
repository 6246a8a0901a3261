// What a picture begins as: noise, in the page's own colours.

// The noise clears towards the right, and what is under it shows: a sun over water.
function dawn(x, y) {
  const [dx, dy] = [x - 0.62, y - 0.5];
  const isWater = y > 0.62;
  const ripple = isWater && Math.sin(y * 95) > 0.25 ? 0.55 : 1;
  const inSun = isWater ? Math.abs(dx) < 0.15 * (1.15 - y) * 2 * ripple : dx * dx + dy * dy < 0.05;
  if (inSun) return isWater ? [236, 120, 78] : [255, 146, 98];
  return isWater ? [46 + 26 * (1 - y), 36, 40] : [38 + 120 * y * y, 27 + 44 * y * y, 34 + 20 * y];
}

// With `clears`, only the left is noise all through.
export function noise(columns, rows, salt = 1, clears = false) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  let state = 0x9e3779b9 ^ Math.imul(salt, 0x85ebca6b);
  const next = () => {
    state = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x6d2b79f5;
    return ((state ^ (state >>> 13)) >>> 0) / 2 ** 32;
  };
  for (let at = 0; at < image.data.length; at += 4) {
    const normal = next() + next() + next() + next() - 2;
    const tint = next() + next() - 1;
    const grain = [104 + 92 * normal + 62 * tint, 78 + 74 * normal - 10 * tint, 74 + 70 * normal - 52 * tint];
    const [x, y] = [((at / 4) % columns) / columns, Math.floor(at / 4 / columns) / rows];
    const share = clears ? Math.min(1, Math.max(0, 1.12 - 1.45 * x)) ** 1.5 : 1;
    const under = clears ? dawn(x, y) : grain;
    for (let channel = 0; channel < 3; channel += 1) {
      image.data[at + channel] = share * grain[channel] + (1 - share) * under[channel];
    }
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
