// Cooperative threads on one OS thread: what a CUDA thread becomes when a kernel runs on a CPU.
//
// A fiber runs until it blocks or returns; nothing preempts it, so a kernel gives the same bits on every run.
// The first entry onto a fiber's stack is made by ucontext; every later switch is a _setjmp/_longjmp pair, which
// unlike swapcontext makes no system call.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cnk::host {

// A kernel did something that the hardware would have let pass or answered with garbage.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Fibers {
 public:
  // Runs body(0) ... body(count - 1) until all have returned. Throws Fault on fail() and on a deadlock, which it
  // describes by `describe(i)` of the first fiber that still waits.
  void run(int count, const std::function<void(int)>& body, const std::function<std::string(int)>& describe) {
    while (static_cast<int>(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
    body_ = &body;
    ready_.clear();
    fault_.clear();
    for (int i = 0; i < count; ++i) {
      fibers_[i]->done = false;
      ready_.push_back(i);
    }
    while (!ready_.empty()) {
      current_ = ready_.front();
      ready_.pop_front();
      resume();
      if (!fault_.empty()) {
        fibers_.clear();  // their stacks are half way through the kernel
        throw Fault(fault_);
      }
    }
    for (int i = 0; i < count; ++i) {
      if (fibers_[i]->done) continue;
      std::string where = describe(i);
      fibers_.clear();
      throw Fault("deadlock: " + where);
    }
  }

  int current() const { return current_; }
  bool done(int fiber) const { return fibers_[fiber]->done; }
  void wake(int fiber) { ready_.push_back(fiber); }

  // Suspends the calling fiber until wake().
  void block() {
    if (_setjmp(fibers_[current_]->state) == 0) _longjmp(scheduler_, 1);
  }

  // Abandons every fiber; run() throws the message.
  [[noreturn]] void fail(const std::string& message) {
    fault_ = message;
    _longjmp(scheduler_, 1);
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;

  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t context;
    jmp_buf state;
    bool entered = false;
    bool done = false;
  };

  void resume() {
    Fiber& fiber = *fibers_[current_];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.entered) _longjmp(fiber.state, 1);
    fiber.entered = true;
    entering_ = this;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Fibers::enter, 0);
    setcontext(&fiber.context);
  }

  // A fiber outlives the block it ran: for the next one it goes on from its own block() below.
  static void enter() {
    Fibers* self = entering_;
    for (;;) {
      const int index = self->current_;
      (*self->body_)(index);
      self->fibers_[index]->done = true;
      self->block();
    }
  }

  inline static Fibers* entering_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::deque<int> ready_;
  const std::function<void(int)>* body_ = nullptr;
  std::string fault_;
  jmp_buf scheduler_;
  int current_ = 0;
};

}  // namespace cnk::host
