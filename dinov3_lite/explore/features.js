"use strict";
// What is computed from patch vectors: cosine similarity and principal components. Knows nothing of the page.

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// One picture's features in one block. `vectors` are int8, row after row of as many as `channels`;
// scales[i] * channels[c] * vectors[i * dim + c] is what the model gave.
function readLayer(layer) {
  const vectors = new Int8Array(bytes(layer.vectors).buffer);
  const channels = new Float32Array(bytes(layer.channels).buffer);
  const dim = channels.length, count = vectors.length / dim;
  const norms = new Float64Array(count); // without the scale
  for (let i = 0, d = 0; i < count; i++) {
    let sum = 0;
    for (let c = 0; c < dim; c++, d++) sum += (channels[c] * vectors[d]) ** 2;
    norms[i] = Math.sqrt(sum) || 1;
  }
  return {
    vectors, channels, norms, count, dim,
    scales: new Float32Array(bytes(layer.scales).buffer),
    cls: unit(Float64Array.from(new Int8Array(bytes(layer.cls).buffer), (v, c) => v * channels[c])),
    attention: bytes(layer.attention), peaks: layer.peaks,
  };
}

const valueOf = (layer, i, c) => layer.scales[i] * layer.channels[c] * layer.vectors[i * layer.dim + c];

// A unit vector in the direction of patch i.
function direction(layer, i) {
  return Float64Array.from(layer.channels, (scale, c) => (scale * layer.vectors[i * layer.dim + c]) / layer.norms[i]);
}

function unit(vector) {
  const norm = Math.sqrt(vector.reduce((sum, v) => sum + v * v, 0)) || 1;
  return Float64Array.from(vector, (v) => v / norm);
}

// The direction of a weighted sum of patches' directions: terms are {layer, patch, sign}.
function query(terms) {
  const sum = new Float64Array(terms[0].layer.dim);
  for (const { layer, patch, sign } of terms) {
    const one = direction(layer, patch);
    for (let d = 0; d < sum.length; d++) sum[d] += sign * one[d];
  }
  return unit(sum);
}

// Cosine similarity of every patch to a unit vector.
function cosines(layer, towards) {
  const out = new Float32Array(layer.count);
  const scaled = towards.map((v, c) => v * layer.channels[c]);
  for (let i = 0, d = 0; i < layer.count; i++) {
    let sum = 0;
    for (let c = 0; c < layer.dim; c++, d++) sum += layer.vectors[d] * scaled[c];
    out[i] = sum / layer.norms[i];
  }
  return out;
}

// What the CLS token attends to: of one head in 0 .. heads - 1, or the mean of all for head -1.
function attention(layer, head) {
  const out = new Float32Array(layer.count);
  const heads = head < 0 ? layer.peaks.map((_, h) => h) : [head];
  for (const h of heads)
    for (let i = 0; i < layer.count; i++)
      out[i] += (layer.peaks[h] * layer.attention[h * layer.count + i]) / 255 / heads.length;
  return out;
}

// Three principal components of chosen patches of several layers, by orthogonal iteration; null for fewer than four.
// `chosen` holds an array of patch indices for each layer. Each component's largest weight is positive.
function components(layers, chosen) {
  const dim = layers[0].dim;
  const count = chosen.reduce((sum, patches) => sum + patches.length, 0);
  if (count < 4) return null;
  const rows = new Float32Array(count * dim);
  const mean = new Float64Array(dim);
  let at = 0;
  layers.forEach((layer, l) => {
    for (const i of chosen[l])
      for (let c = 0; c < dim; c++, at++) mean[c] += (rows[at] = valueOf(layer, i, c)) / count;
  });
  for (let i = 0, d = 0; i < count; i++) for (let c = 0; c < dim; c++, d++) rows[d] -= mean[c];

  const K = 6; // three more than wanted, so that the third converges fast
  let basis = Array.from({ length: K }, (_, k) => Float64Array.from({ length: dim }, (_, c) => Math.sin((k + 1) * (c + 1.7))));
  let variances = new Float64Array(K);
  for (let round = 0; round < 300; round++) {
    orthonormalise(basis);
    const next = basis.map(() => new Float64Array(dim));
    for (let i = 0; i < count; i++) {
      const row = rows.subarray(i * dim, (i + 1) * dim);
      for (let k = 0; k < K; k++) {
        let sum = 0;
        for (let c = 0; c < dim; c++) sum += row[c] * basis[k][c];
        for (let c = 0; c < dim; c++) next[k][c] += sum * row[c];
      }
    }
    const now = next.map((v, k) => v.reduce((sum, x, c) => sum + x * basis[k][c], 0) / (count - 1));
    const settled = now.slice(0, 3).every((v, k) => Math.abs(v - variances[k]) <= 1e-7 * now[0]);
    variances = now;
    if (settled && round > 10) break;
    basis = next;
  }
  orthonormalise(basis);
  const three = basis.slice(0, 3).map((v) => {
    const largest = v.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    return largest < 0 ? v.map((x) => -x) : v;
  });
  return { mean, basis: three, deviations: Array.from(variances).slice(0, 3).map((v) => Math.sqrt(Math.max(v, 1e-20))) };
}

function orthonormalise(basis) {
  for (let k = 0; k < basis.length; k++) {
    for (let twice = 0; twice < 2; twice++)
      for (let j = 0; j < k; j++) {
        let sum = 0;
        for (let c = 0; c < basis[k].length; c++) sum += basis[k][c] * basis[j][c];
        for (let c = 0; c < basis[k].length; c++) basis[k][c] -= sum * basis[j][c];
      }
    basis[k] = unit(basis[k]);
  }
}

// The colour of a patch: its components whitened (unit variance), times two, through a sigmoid, as [r, g, b] in 0 .. 1.
function pcaColour(layer, i, pca) {
  return pca.basis.map((v, k) => {
    let sum = 0;
    for (let c = 0; c < layer.dim; c++) sum += (valueOf(layer, i, c) - pca.mean[c]) * v[c];
    return 1 / (1 + Math.exp((-2 * sum) / pca.deviations[k]));
  });
}
