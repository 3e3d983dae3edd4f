// The global memory that a call may touch: its tensors, and which block of the launch touched what.
//
// Blocks of a launch run in any order, at any time: where one writes, no other may read or write. That holds for every
// kernel here, which has neither atomics nor flags.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cnk::host {

class GlobalMemory {
 public:
  enum class Verdict { fine, outside, read_of_written, write_of_written, write_of_read };
  struct Finding {
    Verdict verdict = Verdict::fine;
    int64_t other = 0;  // the block on the other side of a race; kSeveral: more than one
  };
  static constexpr int32_t kSeveral = -2;

  void clear() { tensors_.clear(); }
  void add(uintptr_t address, size_t bytes) { tensors_.push_back({address, address + bytes, {}}); }

  // Earlier launches are over and done with.
  void begin_launch() { ++launch_; }

  Finding access(uintptr_t address, size_t bytes, int32_t block, bool is_write) {
    for (Tensor& tensor : tensors_)
      if (tensor.begin <= address && address + bytes <= tensor.end) return note(tensor, address, bytes, block, is_write);
    return {Verdict::outside};
  }

 private:
  static constexpr size_t kCellBytes = 2;
  static constexpr int32_t kNobody = -1;

  struct Cell {
    uint32_t launch = 0;
    int32_t writer = kNobody, reader = kNobody;
  };
  struct Tensor {
    uintptr_t begin, end;
    std::vector<Cell> cells;  // made at the first touch
  };

  Finding note(Tensor& tensor, uintptr_t address, size_t bytes, int32_t block, bool is_write) {
    if (tensor.cells.empty()) tensor.cells.resize((tensor.end - tensor.begin + kCellBytes - 1) / kCellBytes);
    const size_t first = (address - tensor.begin) / kCellBytes, last = (address + bytes - 1 - tensor.begin) / kCellBytes;
    for (size_t i = first; i <= last; ++i) {
      Cell& cell = tensor.cells[i];
      if (cell.launch != launch_) cell = {launch_, kNobody, kNobody};
      if (cell.writer != kNobody && cell.writer != block)
        return {is_write ? Verdict::write_of_written : Verdict::read_of_written, cell.writer};
      if (is_write) {
        if (cell.reader != kNobody && cell.reader != block) return {Verdict::write_of_read, cell.reader};
        cell.writer = block;
      } else {
        cell.reader = cell.reader == kNobody || cell.reader == block ? block : kSeveral;
      }
    }
    return {};
  }

  std::vector<Tensor> tensors_;
  uint32_t launch_ = 0;
};

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

}  // namespace cnk::host
