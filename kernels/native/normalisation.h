// SPDX-License-Identifier: Apache-2.0
// Normalisation of a row of values, there and back; see
// gpu_rnn/backends/normalisation.py. With `rms` the mean that is taken off, of
// values or of gradients, is 0.

// The first lanes of a value, the others 0.
static inline real within(real value, long count) {
  for (long lane = count < 0 ? 0 : count; lane < LANES; lane++)
    value[lane] = 0;
  return value;
}

static inline scalar mean_of(real sums, long count) {
  scalar total = 0;
  for (int lane = 0; lane < LANES; lane++)
    total += sums[lane];
  return total / count;
}

// Puts the normal values in their place; returns 1 over their deviation.
static scalar normalise(scalar *values, long count, long rms) {
  real sum = {0}, squares = {0};
  for (long k = 0; k < count && !rms; k += LANES)
    sum += load(values + k, count - k);
  const scalar mean = mean_of(sum, count);
  for (long k = 0; k < count; k += LANES) {
    const real centred = within(load(values + k, count - k) - mean, count - k);
    squares += centred * centred;
    store(values + k, centred, count - k);
  }
  const scalar variance = mean_of(squares, count) + (scalar)EPSILON;
  const scalar rstd = 1 / OF_TYPE(sqrtf(variance), sqrt(variance));
  for (long k = 0; k < count; k += LANES)
    store(values + k, load(values + k, count - k) * rstd, count - k);
  return rstd;
}

// From the gradients of scaled normal values those of the values, in their
// place; adds to that of the scales.
static void normalise_back(scalar *d, const scalar *normal, scalar rstd,
                           const scalar *scale, scalar *d_scale, long count,
                           long rms) {
  real sum = {0}, along = {0};
  for (long k = 0; k < count; k += LANES) {
    const long left = count - k;
    const real of = load(normal + k, left), d_scaled = load(d + k, left);
    const real d_normal = d_scaled * load(scale + k, left);
    add_to(d_scale + k, d_scaled * of, left);
    if (!rms)
      sum += d_normal;
    along += d_normal * of;
    store(d + k, d_normal, left);
  }
  const scalar mean = mean_of(sum, count), slope = mean_of(along, count);
  for (long k = 0; k < count; k += LANES) {
    const long left = count - k;
    const real d_normal = load(d + k, left), of = load(normal + k, left);
    store(d + k, (d_normal - mean - of * slope) * rstd, left);
  }
}
