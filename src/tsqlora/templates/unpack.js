// What packed.py has packed: gzip in base64, by the name of its element.

async function unpacked(name) {
  const element = document.getElementById(`packed-${name}`);
  if (!element) return null;
  const { kind, scale } = element.dataset;
  const binary = atob(element.textContent.trim());
  const zipped = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) zipped[i] = binary.charCodeAt(i);
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const response = new Response(stream);
  element.remove();
  if (kind === "text") return response.text();
  if (kind === "json") return response.json();
  const planes = new Uint8Array(await response.arrayBuffer());
  return kind === "f16" ? halves(planes, Number(scale)) : integers(planes, Number(kind.slice(1)) / 8);
}

function integers(planes, size) {
  const count = planes.length / size;
  const values = new Uint32Array(count);
  for (let plane = 0; plane < size; plane++) {
    for (let i = 0; i < count; i++) values[i] = values[i] * 256 + planes[plane * count + i];
  }
  return values;
}

function halves(planes, scale) {
  const count = planes.length / 2;
  const values = new Float64Array(count);
  const unit = 2 ** scale;
  for (let i = 0; i < count; i++) values[i] = half((planes[i] << 8) | planes[count + i]) * unit;
  return values;
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
