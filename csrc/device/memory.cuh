// Views of global and shared memory. On a GPU they are bare pointers; on a CPU every access is checked: bounds,
// alignment, uninitialised reads and races.
#pragma once
#include "types.cuh"

namespace cnk {

// ---- global memory

template <class T>
struct Global {
  T* pointer;

  __device__ __forceinline__ Global operator+(int64_t offset) const { return {pointer + offset}; }
  __device__ __forceinline__ explicit operator bool() const { return pointer != nullptr; }

  __device__ __forceinline__ T load(int64_t i) const {
#ifdef CNK_HOST
    host::team().check_global(pointer + i, sizeof(T), sizeof(T), false, "a read");
#endif
    return pointer[i];
  }

  __device__ __forceinline__ void store(int64_t i, T value) const {
#ifdef CNK_HOST
    host::team().check_global(pointer + i, sizeof(T), sizeof(T), true, "a write");
#endif
    pointer[i] = value;
  }

  template <int N>
  __device__ __forceinline__ auto load_vec(int64_t i) const;

  template <int N, class V>
  __device__ __forceinline__ void store_vec(int64_t i, const V& value) const;
};

// The integer that one machine access of so many bytes moves.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
#ifdef CNK_HOST
template <>
struct Word<8> {
  using type = Vec<uint32_t, 2>;
};
template <>
struct Word<16> {
  using type = Vec<uint32_t, 4>;
};
#else
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
#endif

template <class T>
struct Mutable {
  using type = T;
};
template <class T>
struct Mutable<const T> {
  using type = T;
};

// One access of the whole word. It must be read as a word before it is taken apart: a memcpy from memory is compiled to
// loads of single bytes.
template <class W>
__device__ __forceinline__ W read_word(const void* from) {
  const W word = *static_cast<const W*>(from);
  return word;
}

template <class T>
template <int N>
__device__ __forceinline__ auto Global<T>::load_vec(int64_t i) const {
  using V = Vec<typename Mutable<T>::type, N>;
#ifdef CNK_HOST
  host::team().check_global(pointer + i, sizeof(V), sizeof(V), false, "a vector read");
#endif
  return bit_cast<V>(read_word<typename Word<sizeof(V)>::type>(pointer + i));
}

template <class T>
template <int N, class V>
__device__ __forceinline__ void Global<T>::store_vec(int64_t i, const V& value) const {
  static_assert(sizeof(V) == sizeof(T) * N, "the vector holds N elements of the view");
#ifdef CNK_HOST
  host::team().check_global(pointer + i, sizeof(V), sizeof(V), true, "a vector write");
#endif
  using W = typename Word<sizeof(V)>::type;
  *reinterpret_cast<W*>(pointer + i) = bit_cast<W>(value);
}

// ---- shared memory

#ifdef CNK_HOST

template <class T>
struct Shared {
  size_t offset = 0;  // in the shared memory of its block
  size_t size = 0;    // elements
  int block = 0;      // rank in the cluster
  const char* name = "";

  T load(int i) const { return load_vec<1>(i)[0]; }
  void store(int i, T value) const { store_vec<1>(i, Vec<T, 1>{{value}}); }

  template <int N>
  Vec<T, N> load_vec(int i) const {
    host::team().check_index(name, i, N, size, offset + i * sizeof(T), N * sizeof(T));
    Vec<T, N> value;
    std::memcpy(&value, host::team().read_shared(block, offset + i * sizeof(T), sizeof(value), name, i), sizeof(value));
    return value;
  }

  template <int N>
  void store_vec(int i, const Vec<T, N>& value) const {
    host::team().check_index(name, i, N, size, offset + i * sizeof(T), N * sizeof(T));
    std::memcpy(host::team().write_shared(block, offset + i * sizeof(T), sizeof(value), name, i), &value,
                sizeof(value));
  }

  Shared slice(int first, int count) const {
    host::team().check_index(name, first, count, size, 0, 0);
    return {offset + first * sizeof(T), static_cast<size_t>(count), block, name};
  }

  // The same bytes as elements of another type.
  template <class U>
  Shared<U> as(const char* other_name) const {
    return {offset, size * sizeof(T) / sizeof(U), block, other_name};
  }

  // The same buffer in another block of the cluster.
  Shared at_rank(int rank) const { return {offset, size, rank, name}; }
};

template <class T>
Shared<T> static_shared(const char* name, size_t count) {
  return {host::team().static_shared(name, count * sizeof(T)), count, host::team().rank(), name};
}
#define CNK_STATIC_SHARED(T, name, count) const ::cnk::Shared<T> name = ::cnk::static_shared<T>(#name, count)

#else

template <class T>
struct Shared {
  T* pointer;

  __device__ __forceinline__ T load(int i) const { return pointer[i]; }
  __device__ __forceinline__ void store(int i, T value) const { pointer[i] = value; }

  template <int N>
  __device__ __forceinline__ Vec<T, N> load_vec(int i) const {
    using V = Vec<T, N>;
    return bit_cast<V>(read_word<typename Word<sizeof(V)>::type>(pointer + i));
  }

  template <int N>
  __device__ __forceinline__ void store_vec(int i, const Vec<T, N>& value) const {
    using W = typename Word<sizeof(value)>::type;
    *reinterpret_cast<W*>(pointer + i) = bit_cast<W>(value);
  }

  __device__ __forceinline__ Shared slice(int first, int) const { return {pointer + first}; }

  template <class U>
  __device__ __forceinline__ Shared<U> as(const char*) const {
    return {reinterpret_cast<U*>(pointer)};
  }

  __device__ __forceinline__ unsigned address(int i) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer + i));
  }

  // The same buffer in another block of the cluster, as a generic address.
  __device__ __forceinline__ Shared at_rank(int rank) const {
    T* remote = nullptr;
#if CNK_HAS_CLUSTERS
    asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(pointer), "r"(rank));
#endif
    return {remote};
  }
};

#define CNK_STATIC_SHARED(T, name, count)           \
  __shared__ __align__(16) T name##_storage[count]; \
  const ::cnk::Shared<T> name {                     \
    name##_storage                                  \
  }

#endif

// Hands out the launch's dynamic shared memory piece by piece; the launcher adds up the same pieces with `bytes`.
class Arena {
 public:
  template <class T>
  __device__ __forceinline__ Shared<T> take(size_t count, const char* name) {
    const size_t begin = top_;
    top_ += bytes<T>(count);
#ifdef CNK_HOST
    host::Team& team = host::team();
    if (top_ > team.launch().shared_bytes) team.fail(std::string("dynamic shared memory is too small for ") + name);
    return {begin, count, team.rank(), name};
#else
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    return {reinterpret_cast<T*>(dynamic_shared + begin)};
#endif
  }

  template <class T>
  __host__ __device__ static constexpr size_t bytes(size_t count) {
    return (count * sizeof(T) + 15) / 16 * 16;
  }

 private:
  size_t top_ = 0;
};

// ---- asynchronous copies (cp.async)

// Starts to copy 16 bytes into to[i]; of these only the first `valid` elements are read, the rest become zero.
template <class T>
__device__ __forceinline__ void copy_async(Shared<T> to, int i, Global<const T> from, int64_t j, int valid) {
#ifdef CNK_HOST
  host::team().check_index(to.name, i, 16 / sizeof(T), to.size, to.offset + i * sizeof(T), 16);
  host::team().copy_async(to.offset + i * sizeof(T), 16, from.pointer + j, valid * sizeof(T), to.name, i);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(i)), "l"(from.pointer + j),
               "r"(valid * static_cast<int>(sizeof(T)))
               : "memory");
#endif
}

// The same of all 16 bytes at from[0]: without the count of valid bytes, the copy is one instruction.
template <class T>
__device__ __forceinline__ void copy_async_piece(Shared<T> to, int i, Global<const T> from) {
#ifdef CNK_HOST
  copy_async(to, i, from, 0, static_cast<int>(16 / sizeof(T)));
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address(i)), "l"(from.pointer) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef CNK_HOST
  host::team().commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `ALLOWED` of this thread's newest groups are still under way.
template <int ALLOWED>
__device__ __forceinline__ void wait_copies() {
#ifdef CNK_HOST
  host::team().wait_copies(ALLOWED);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(ALLOWED) : "memory");
#endif
}

}  // namespace cnk
