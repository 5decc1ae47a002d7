// SPDX-License-Identifier: Apache-2.0
// Normalisation of a row of values, there and back; see
// gpu_rnn/backends/normalisation.py. With `rms` the mean that is taken off, of
// values or of gradients, is 0.

// The first lanes of a value, the others 0.
static inline real within(real value, long count) {
  truth lanes;
  for (int lane = 0; lane < LANES; lane++)
    lanes[lane] = lane;
  return count >= LANES ? value : where_(lanes < (bits)count, value, K(0));
}

static inline scalar mean_of(real sums, long count) {
  return total_of(sums) / count;
}

// Puts the scaled normal values in their place, and in `normal`, if that is
// there, those before; returns 1 over the deviation.
static inline scalar normalise(scalar *values, long count, long rms,
                               const scalar *scale, scalar *normal) {
  real sum = {0}, squares = {0};
  for (long k = 0; k < count && !rms; k += LANES)
    sum += load(values + k, count - k);
  const scalar mean = mean_of(sum, count);
  for (long k = 0; k < count; k += LANES) {
    const real centred = within(load(values + k, count - k) - mean, count - k);
    squares += centred * centred;
  }
  const scalar variance = mean_of(squares, count) + (scalar)EPSILON;
  const scalar rstd = 1 / OF_TYPE(sqrtf(variance), sqrt(variance));
  for (long k = 0; k < count; k += LANES) {
    const long left = count - k;
    const real value = (load(values + k, left) - mean) * rstd;
    if (normal)
      store(normal + k, value, left);
    store(values + k, value * load(scale + k, left), left);
  }
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
