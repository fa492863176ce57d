// What differs between a host compiler and nvcc, and the team that solves one problem together.
//
// A team is anything with lane(), width() and sync(). Work on separate elements is shared out by lane; every reduction is
// done by every lane, in index order, so control flow is uniform and the bits do not depend on the width. The build
// passes -ffp-contract=off (nvcc: --fmad=false) so that they do not depend on the compiler's choice of FMA either;
// no algorithm here needs contraction, or its absence, for more than rounding.
#pragma once

#if defined(__CUDACC__)
#define IGB_HD __host__ __device__
// Before a function template for both that is given, on the host, what is for the host alone.
#define IGB_ANY_CALLABLE _Pragma("nv_exec_check_disable")
#else
#define IGB_HD
#define IGB_ANY_CALLABLE
#endif

namespace igb {

struct SerialTeam {
  IGB_HD int lane() const { return 0; }
  IGB_HD int width() const { return 1; }
  IGB_HD void sync() const {}
};

#if defined(__CUDACC__)
// One full warp. The methods are callable from host code only so that host-and-device templates accept the type.
class WarpTeam {
 public:
  IGB_HD explicit WarpTeam(int lane) : lane_(lane) {}
  IGB_HD int lane() const { return lane_; }
  IGB_HD int width() const { return 32; }
  IGB_HD void sync() const {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
  }

 private:
  int lane_;
};

// A block of one warp or more.
class BlockTeam {
 public:
  IGB_HD BlockTeam(int lane, int width) : lane_(lane), width_(width) {}
  IGB_HD int lane() const { return lane_; }
  IGB_HD int width() const { return width_; }
  IGB_HD void sync() const {
#if defined(__CUDA_ARCH__)
    if (width_ == 32) __syncwarp();  // cheaper than the block's barrier
    else __syncthreads();
#endif
  }

 private:
  int lane_, width_;
};
#endif

}  // namespace igb
