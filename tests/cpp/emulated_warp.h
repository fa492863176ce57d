// Runs W lanes as fibers, one at a time from sync to sync, in ascending or descending order. A result that depends on
// what another lane did since the last sync differs between the two orders: a missing sync shows, deterministically.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace check {

class EmulatedWarp {
 public:
  class Lane {
   public:
    Lane(EmulatedWarp* warp, int lane) : warp_(warp), lane_(lane) {}
    int lane() const { return lane_; }
    int width() const { return static_cast<int>(warp_->fibers_.size()); }
    void sync() const { swapcontext(&warp_->fibers_[lane_].context, &warp_->scheduler_); }

   private:
    EmulatedWarp* warp_;
    int lane_;
  };

  EmulatedWarp(int width, bool descending) : fibers_(width), descending_(descending) {}

  // False if some lanes finished while others wait: a sync that not every lane reaches.
  bool run(const std::function<void(const Lane&)>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers_) prepare(fiber);
    const int width = static_cast<int>(fibers_.size());
    for (int finished = 0; finished < width;) {
      for (int turn = 0; turn < width; ++turn) {
        current_ = descending_ ? width - 1 - turn : turn;
        active() = this;
        swapcontext(&scheduler_, &fibers_[current_].context);
        if (fibers_[current_].done) ++finished;
      }
      if (finished != 0 && finished != width) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t stack_size = 256 * 1024;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };

  void prepare(Fiber& fiber) {
    fiber.stack.reset(new char[stack_size]);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &EmulatedWarp::enter, 0);
  }

  static EmulatedWarp*& active() {
    static EmulatedWarp* warp = nullptr;
    return warp;
  }

  static void enter() {
    EmulatedWarp* warp = active();
    const int lane = warp->current_;
    (*warp->body_)(Lane(warp, lane));
    warp->fibers_[lane].done = true;
  }

  std::vector<Fiber> fibers_;
  bool descending_;
  ucontext_t scheduler_;
  const std::function<void(const Lane&)>* body_ = nullptr;
  int current_ = 0;
};

}  // namespace check
