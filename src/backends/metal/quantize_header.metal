using namespace metal;

// Column k of a row, less its shift and over its smoothing; what is absent is not read.
template <bool SHIFT, bool SMOOTH, typename X, typename Z, typename M>
float ditq_centred(X x, Z shift, M smoothing, int k) {
  float value = float(x[k]);
  if (SHIFT) value -= shift[k];
  if (SMOOTH) value /= smoothing[k];
  return value;
}

