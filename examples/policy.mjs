// One agent's policy without a server, from the bundle's ONNX file: in Node, and in a browser with the same package.
//
//     npm install onnxruntime-web
//     node policy.mjs BUNDLE/agent_0/1/model.onnx
//
// In a browser, give `load` the file's address. CI does not run this file: npm has to fetch the package (make slow does).
import * as ort from "onnxruntime-web";

/** Load a graph from an address or from bytes. */
export const load = (model) => ort.InferenceSession.create(model);

/** Act on one observation. Without noise the action is deterministic; with standard normal numbers, a sample. */
export async function act(session, observation, noise) {
  const row = (numbers) => new ort.Tensor("float32", Float32Array.from(numbers), [1, numbers.length]);
  const answer = await session.run(
    { observation: row(observation), noise: row(noise) },
    ["action", "divergence"],
  );
  return { action: Array.from(answer.action.data), divergence: answer.divergence.data[0] };
}

/** Widths of the inputs by name, as the graph declares them. */
export const widths = (session) =>
  Object.fromEntries(session.inputMetadata.map((input) => [input.name, input.shape[1]]));

if (globalThis.process?.argv[1]?.endsWith("policy.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const session = await load(new Uint8Array(await readFile(process.argv[2])));
  const { observation, noise } = widths(session);
  const wave = Array.from({ length: observation }, (_, i) => Math.sin(i)); // in the place of your sensors
  const { action, divergence } = await act(session, wave, Array(noise).fill(0));
  console.log(`action ${action}, divergence ${divergence} nats`);
}
