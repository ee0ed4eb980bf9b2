// The samples: columns as they were packed, and which rows are wanted in which order.

const SELECTED = 1, DOUBTFUL = 2, TELLING = 4;
const ORDERS = {
  all: ["id", false], wrong: ["credibility", false], alike: ["group", false], telling: ["drawn", true],
};

async function readSamples(notes) {
  const names = ["id", "flags", "group", "class", "prediction", "text", "target", ...Object.keys(notes.numbers)];
  const pieces = await Promise.all(names.map(unpacked));
  const samples = Object.fromEntries(names.map((name, i) => [name, pieces[i]]));
  for (const name of ["text", "target"]) {
    samples[name] = samples[name] === null ? null : samples[name].split("\n");
  }
  return { ...samples, notes, count: notes.count, ...kinship(samples.group, (i) => targetOf({ ...samples, notes }, i)) };
}

// Of every group of near-duplicates: its first sample, how many there are, whether targets differ.
function kinship(group, target) {
  const kin = new Map();
  for (let i = 0; group && i < group.length; i++) {
    if (!group[i]) continue;
    const known = kin.get(group[i]);
    if (!known) kin.set(group[i], { first: i, size: 1, split: false });
    else {
      known.size += 1;
      known.split ||= target(i) !== target(known.first);
    }
  }
  return { kin };
}

function targetOf(samples, i) {
  if (samples.class) return samples.notes.classes[samples.class[i]];
  return samples.target ? samples.target[i] : "";
}

function predictionOf(samples, i) {
  if (!samples.prediction) return "";
  if (samples.notes.predicts === "numbers") return say(samples.prediction[i]);
  return samples.prediction[i] ? samples.notes.classes[samples.prediction[i] - 1] : "";
}

function contradicted(samples, i) {
  const { prediction, notes } = samples;
  return notes.predicts === "classes" && prediction[i] > 0 && prediction[i] - 1 !== samples.class[i];
}

// Which rows the filters let through.
function filtered(samples, wanted) {
  const bit = { wrong: DOUBTFUL, telling: TELLING }[wanted.view] ?? 0;
  const words = wanted.query.toLowerCase();
  if (words && !samples.searched) samples.searched = searchable(samples);
  const rows = [];
  for (let i = 0; i < samples.count; i++) {
    if (bit && !(samples.flags[i] & bit)) continue;
    if (wanted.view === "alike" && !samples.group[i]) continue;
    if (wanted.group && samples.group[i] !== wanted.group) continue;
    if (wanted.selected && ((samples.flags[i] & SELECTED) !== 0) !== (wanted.selected === "yes")) continue;
    if (wanted.target !== "" && samples.class[i] !== Number(wanted.target)) continue;
    if (wanted.differs && !contradicted(samples, i)) continue;
    if (wanted.most !== "" && !(samples.credibility[i] <= Number(wanted.most))) continue;
    if (words && !samples.searched[i].includes(words)) continue;
    rows.push(i);
  }
  return rows;
}

function searchable(samples) {
  return Array.from({ length: samples.count }, (_, i) =>
    `${samples.id[i]}\n${samples.text ? samples.text[i] : ""}\n${targetOf(samples, i)}`.toLowerCase());
}

// Numbers that were not measured come last, and of equals the first row first.
function sorted(samples, rows, [name, falling]) {
  const sign = falling ? -1 : 1;
  if (name === "target" || name === "prediction" || name === "text") {
    const said = { target: targetOf, prediction: predictionOf, text: (s, i) => s.text[i] }[name];
    const texts = new Map(rows.map((i) => [i, said(samples, i)]));
    const order = (a, b) => (texts.get(a) < texts.get(b) ? -1 : texts.get(a) > texts.get(b) ? 1 : 0);
    return rows.sort((a, b) => sign * order(a, b) || a - b);
  }
  const values = name === "selected" ? samples.flags.map((flag) => flag & SELECTED) : samples[name];
  const key = (i) => (Number.isNaN(values[i]) ? sign * Infinity : values[i]);
  return rows.sort((a, b) => (key(a) === key(b) ? a - b : sign * (key(a) - key(b))));
}

function csv(samples, rows) {
  const names = Object.keys(samples.notes.numbers);
  const lines = rows.map((i) =>
    [samples.id[i], samples.flags[i] & SELECTED, ...names.map((name) => round(samples[name][i]))].join(","));
  return [["id", "selected", ...names].join(","), ...lines, ""].join("\n");
}

function round(value) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "";
}

function say(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return value.toPrecision(3).includes("e") ? value.toFixed(0) : value.toPrecision(3);
}
