// One-sided Jacobi: rotates vectors in pairs until all are orthogonal. Vectors of very different lengths keep the
// relative precision of each (Demmel & Veselic, 1992), which an eigenvalue decomposition of their products does not.
#pragma once

#include "linalg.h"

namespace igb {

struct PairProducts {
  double aa, ab, bb;
};

IGB_HD inline PairProducts multiply_pair(int length, const double* a, const double* b) {
  PairProducts products{0.0, 0.0, 0.0};
  for (int i = 0; i < length; ++i) {
    products.aa += a[i] * a[i];
    products.ab += a[i] * b[i];
    products.bb += b[i] * b[i];
  }
  return products;
}

// Rotates `count` nonzero vectors, `stride` apart, in place, and the numbers p with them; false if they are not orthogonal
// to rounding after the cap. In each round of a sweep the pairs are disjoint, and each is one lane's (a round-robin
// tournament). `worst` takes a double for each pair of a round, (count + 1) / 2.
template <class Team>
IGB_HD bool orthogonalize(int count, int length, int stride, double* vectors, double* p, double* worst,
                          const Team& team) {
  constexpr int max_sweeps = 30;
  const int players = count + count % 2, pairs = players / 2, circle = players - 1;
  const double tolerance = length * machine_epsilon;
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    for (int pair = team.lane(); pair < pairs; pair += team.width()) worst[pair] = 0.0;
    for (int round = 0; round < circle; ++round) {
      for (int pair = team.lane(); pair < pairs; pair += team.width()) {
        const int first = (round + pair) % circle, second = pair == 0 ? circle : (round + circle - pair) % circle;
        if (first >= count || second >= count) continue;  // of an odd number one rests
        double* a = vectors + first * stride;
        double* b = vectors + second * stride;
        const PairProducts products = multiply_pair(length, a, b);
        const double overlap = fabs(products.ab) / (sqrt(products.aa) * sqrt(products.bb));
        if (!(overlap > machine_epsilon)) continue;
        if (overlap > worst[pair]) worst[pair] = overlap;
        const double cotangent = 0.5 * (products.aa - products.bb) / products.ab;  // of twice the angle
        const double magnitude = fabs(cotangent);
        const double root = magnitude < 1e150 ? sqrt(1.0 + cotangent * cotangent) : magnitude;
        const Rotation rotation((cotangent < 0.0 ? -1.0 : 1.0) / (magnitude + root));
        for (int i = 0; i < length; ++i) rotation.apply(a[i], b[i]);
        rotation.apply(p[first], p[second]);
      }
      team.sync();
    }
    double largest = 0.0;
    for (int pair = 0; pair < pairs; ++pair) largest = fmax(largest, worst[pair]);
    team.sync();
    if (largest <= tolerance) return true;
  }
  return false;
}

}  // namespace igb
