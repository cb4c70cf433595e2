// Prints, as JSON, everything that h5wasm (the reader inside h5web and myHDF5) sees in each file given.
import { readFileSync } from "node:fs";
import h5wasm from "h5wasm/node";

await h5wasm.ready;

// JSON has neither NaN nor 64-bit integers: both go as text.
const plain = (value) =>
  typeof value === "bigint" || (typeof value === "number" && !Number.isFinite(value)) ? String(value) : value;
const list = (value) =>
  typeof value === "string" || typeof value === "number" || typeof value === "bigint"
    ? [plain(value)]
    : Array.from(value, plain);

function visit(path, node, seen) {
  const attributes = {};
  for (const name of Object.keys(node.attrs)) {
    if (!["DIMENSION_LIST", "REFERENCE_LIST"].includes(name)) attributes[name] = list(node.attrs[name].value);
  }
  if (node.type === "Dataset") {
    seen[path] = { shape: node.shape, dtype: node.dtype, values: list(node.value), attributes };
    return;
  }
  seen[path] = { children: node.keys(), attributes };
  for (const name of node.keys()) visit(`${path === "/" ? "" : path}/${name}`, node.get(name), seen);
}

const files = {};
for (const path of process.argv.slice(2)) {
  const file = new h5wasm.File(path, "r");
  files[path] = {};
  visit("/", file, files[path]);
  file.close();
}
process.stdout.write(JSON.stringify(files));
