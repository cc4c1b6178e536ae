// Runs an artifact of relax_llm without Python: TVM's runtime library, the headers of its FFI, the C++17 library.
//
//     host ARTIFACT NEW_TOKENS TOKEN_ID...
//
// evaluates the token ids in one call of `prefill`, continues greedily with one call of `decode` for each token, and
// prints the new token ids. How the functions are called, and how the caches lie in memory, is in
// docs/ahead-of-time.md.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "artifact.h"

namespace {

constexpr int64_t kTile = 16;     // positions in a tile of a cache
constexpr int64_t kGranule = 64;  // capacities are multiples of this

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The keys and values of one sequence in every layer: tensors that grow as tokens come, [1, kv_heads, tiles, ...].
//
//        f32                       bf16, kept as its bits, and q8, codes of a byte
// keys   [..., head_dim, kTile]    [..., head_dim / 2 (rounded up), kTile, 2]
// values [..., kTile, head_dim]    [..., kTile / 2, head_dim, 2]
//
// In q8 two more, the scales of keys and of values: float32 [..., kTile].
class Caches {
 public:
  Caches(std::vector<Cache> layers, int64_t context_length)
      : layers_(std::move(layers)), context_length_(context_length) {}

  int64_t length() const { return length_; }

  // The argument of the compiled functions, with room for `count` more tokens.
  const ffi::Array<ffi::Tensor>& Reserve(int64_t count) {
    int64_t needed = length_ + count;
    if (needed > context_length_) {
      throw std::runtime_error(std::to_string(needed) + " tokens do not fit the model's context of " +
                               std::to_string(context_length_) + "; ask for fewer.");
    }
    if (needed > capacity_) {
      int64_t limit = RoundUp(context_length_, kGranule);
      Grow(std::min(std::max(RoundUp(needed, kGranule), 2 * capacity_), limit));
    }
    return tensors_;
  }

  void Advance(int64_t count) { length_ += count; }

 private:
  struct Part {
    std::vector<int64_t> tile;  // its shape
    const char* dtype;
  };

  // The tensors of a layer.
  static std::vector<Part> Parts(const Cache& layer) {
    int64_t dim = layer.head_dim;
    if (layer.format == "f32") return {{{dim, kTile}, "float32"}, {{kTile, dim}, "float32"}};
    std::vector<int64_t> keys = {RoundUp(dim, 2) / 2, kTile, 2}, values = {kTile / 2, dim, 2};
    if (layer.format == "bf16") return {{keys, "uint16"}, {values, "uint16"}};
    return {{keys, "int8"}, {values, "int8"}, {{kTile}, "float32"}, {{kTile}, "float32"}};
  }

  void Grow(int64_t capacity) {
    ffi::Array<ffi::Tensor> grown;
    int64_t tiles = capacity / kTile, used = RoundUp(length_, kTile) / kTile, before = capacity_ / kTile;
    for (const Cache& layer : layers_) {
      for (const Part& part : Parts(layer)) {
        std::vector<int64_t> shape = {1, layer.kv_heads, tiles};
        shape.insert(shape.end(), part.tile.begin(), part.tile.end());
        ffi::Tensor tensor = NewTensor(shape, part.dtype);
        if (used > 0) {
          int64_t tile = ffi::GetDataSize(*tensor.GetDLTensorPtr()) / (layer.kv_heads * tiles);  // bytes
          const char* from = static_cast<const char*>(tensors_[grown.size()].data_ptr());
          char* to = static_cast<char*>(tensor.data_ptr());
          for (int64_t head = 0; head < layer.kv_heads; ++head) {
            std::copy_n(from + head * before * tile, used * tile, to + head * tiles * tile);
          }
        }
        grown.push_back(tensor);
      }
    }
    tensors_ = grown;
    capacity_ = capacity;
  }

  std::vector<Cache> layers_;
  int64_t context_length_;
  int64_t length_ = 0;
  int64_t capacity_ = 0;
  ffi::Array<ffi::Tensor> tensors_;
};

class Model {
 public:
  explicit Model(const Artifact& artifact)
      : vocab_size_(artifact.vocab_size),
        caches_(artifact.caches, artifact.context_length),
        weights_(artifact.weights),
        library_(ffi::Module::LoadFromFile(artifact.library)),
        machine_(Function(library_, "vm_load_executable")().cast<ffi::Module>()) {
    constexpr int kCPU = 1, kPooled = 2;
    Function(machine_, "vm_initialization")(kCPU, 0, kPooled);
    prefill_ = Function(machine_, "prefill");
    decode_ = Function(machine_, "decode");
    greedy_ = Function(machine_, "greedy");
  }

  // Appends tokens and gives the likeliest one to follow.
  int32_t Next(const std::vector<int32_t>& ids) {
    int64_t count = static_cast<int64_t>(ids.size());
    for (int32_t id : ids) {
      if (id < 0 || id >= vocab_size_) {
        throw std::runtime_error("Token id " + std::to_string(id) + " is outside the vocabulary of " +
                                 std::to_string(vocab_size_) + ".");
      }
    }
    const ffi::Array<ffi::Tensor>& caches = caches_.Reserve(count);
    ffi::Tensor token_ids = NewTensor({1, count}, "int32");
    std::copy(ids.begin(), ids.end(), static_cast<int32_t*>(token_ids.data_ptr()));
    ffi::Shape kv_len({caches_.length() + count});
    const ffi::Function& function = count == 1 ? decode_ : prefill_;
    ffi::Tensor logits = function(token_ids, kv_len, caches, weights_).cast<ffi::Tensor>();  // [1, 1, vocab]
    caches_.Advance(count);
    ffi::Tensor likeliest = greedy_(logits).cast<ffi::Tensor>();  // [1, 1, 1]
    return *static_cast<const int32_t*>(likeliest.data_ptr());
  }

 private:
  static ffi::Function Function(const ffi::Module& module, const char* name) {
    ffi::Optional<ffi::Function> found = module->GetFunction(name, /*query_imports=*/true);
    if (!found.has_value()) {
      throw std::runtime_error(std::string("The library has no function ") + name + "; compile the artifact again.");
    }
    return found.value();
  }

  int64_t vocab_size_;
  Caches caches_;
  ffi::Array<ffi::Tensor> weights_;
  ffi::Module library_, machine_;
  ffi::Function prefill_, decode_, greedy_;
};

int64_t Number(const char* text, const char* what) {
  char* end = nullptr;
  long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0 || value > INT32_MAX) {
    throw std::runtime_error(std::string(what) + " must be a whole number, not '" + text + "'.");
  }
  return value;
}

int Run(int argc, char** argv) {
  if (argc < 4) {
    throw std::runtime_error("Usage: host ARTIFACT NEW_TOKENS TOKEN_ID...");
  }
  int64_t new_tokens = Number(argv[2], "NEW_TOKENS");
  std::vector<int32_t> ids;
  for (int i = 3; i < argc; ++i) {
    ids.push_back(static_cast<int32_t>(Number(argv[i], "A token id")));
  }
  // Read once, when the first kernel runs. Threads that are bound to cores wait for ever on a busy machine.
  setenv("TVM_NUM_THREADS", std::to_string(std::max(1u, std::thread::hardware_concurrency())).c_str(), 0);
  Artifact artifact(argv[1]);
  Model model(artifact);
  for (int64_t i = 0; i < new_tokens; ++i) {
    ids = {model.Next(ids)};
    std::printf("%d%s", ids[0], i + 1 < new_tokens ? " " : "\n");
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const ffi::Error& error) {
    std::fprintf(stderr, "%s\n", error.message().c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
