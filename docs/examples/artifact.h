// Reading an artifact: manifest.json, and weights.safetensors as a memory map.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

constexpr int64_t kFormat = 3;       // of the manifest
constexpr size_t kAlignment = 64;    // bytes; what the kernels assume of every tensor's address

struct Cache {
  int64_t kv_heads;
  int64_t head_dim;
  std::string format;  // "f32", "bf16" or "q8"
};

// Memory of a tensor: its own, or a place in the map of the weights, which lives as long as the process.
struct Memory {
  void AllocData(DLTensor* tensor, void* mapped) {
    size_t bytes = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    own = mapped == nullptr || reinterpret_cast<uintptr_t>(mapped) % kAlignment != 0;
    tensor->data = mapped;
    if (own) {
      tensor->data = std::aligned_alloc(kAlignment, bytes);
      if (tensor->data == nullptr) throw std::bad_alloc();
      std::memset(tensor->data, 0, bytes);
      if (mapped != nullptr) std::memcpy(tensor->data, mapped, ffi::GetDataSize(*tensor));
    }
  }
  void FreeData(DLTensor* tensor) {
    if (own) std::free(tensor->data);
  }
  bool own = true;
};

inline ffi::Tensor NewTensor(const std::vector<int64_t>& shape, const std::string& dtype, void* mapped = nullptr) {
  return ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(shape), ffi::StringToDLDataType(dtype), DLDevice{kDLCPU, 0}, mapped);
}

// What is wrong with a file, in a sentence.
[[noreturn]] inline void Refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error(path + ": " + why);
}

// The field of a JSON object; a mistake names the file.
template <typename T>
T Field(const json::Object& object, const std::string& name, const std::string& path) {
  auto found = object.find(ffi::String(name));
  if (found == object.end()) Refuse(path, "the field '" + name + "' is missing; compile the artifact again.");
  ffi::Optional<T> value = (*found).second.template try_cast<T>();
  if (!value.has_value()) Refuse(path, "the field '" + name + "' has another type; compile the artifact again.");
  return value.value();
}

inline json::Object ParseObject(const std::string& text, const std::string& path) {
  ffi::String error;
  ffi::Optional<json::Object> found = json::Parse(text, &error).try_cast<json::Object>();
  if (!found.has_value()) Refuse(path, "this is not JSON of an artifact; compile the artifact again.");
  return found.value();
}

inline std::vector<int64_t> Numbers(const json::Array& values) {
  std::vector<int64_t> found;
  for (const ffi::Any& value : values) found.push_back(value.cast<int64_t>());
  return found;
}

struct Artifact {
  explicit Artifact(const std::string& directory) : library(directory + "/lib.so") {
    std::string path = directory + "/manifest.json";
    std::ifstream file(path);
    if (!file) Refuse(path, std::strerror(errno));
    std::ostringstream text;
    text << file.rdbuf();
    json::Object manifest = ParseObject(text.str(), path);
    int64_t format = Field<int64_t>(manifest, "format", path);
    if (format != kFormat) {
      Refuse(path, "the artifact has format " + std::to_string(format) + ", but this program reads format " +
                       std::to_string(kFormat) + ".");
    }
    if (!Field<json::Array>(manifest, "python_kernels", path).empty()) {
      Refuse(path, "the artifact calls kernels in Python, which only a Python process can run.");
    }
    if (access(library.c_str(), R_OK) != 0) Refuse(library, std::strerror(errno));
    vocab_size = Field<int64_t>(manifest, "vocab_size", path);
    context_length = Field<int64_t>(manifest, "context_length", path);
    for (const ffi::Any& entry : Field<json::Array>(manifest, "caches", path)) {
      json::Object cache = entry.cast<json::Object>();
      std::string stored = Field<ffi::String>(cache, "format", path);
      if (stored != "f32" && stored != "bf16" && stored != "q8") {
        Refuse(path, "this program knows no caches in " + stored + ".");
      }
      caches.push_back({Field<int64_t>(cache, "kv_heads", path), Field<int64_t>(cache, "head_dim", path), stored});
    }
    Map(directory + "/weights.safetensors", Field<json::Array>(manifest, "weights", path));
  }

  std::string library;
  int64_t vocab_size = 0;
  int64_t context_length = 0;
  std::vector<Cache> caches;
  ffi::Array<ffi::Tensor> weights;  // in the order in which the compiled functions take them

 private:
  // Eight bytes with the length of a JSON header, the header, then the tensors.
  void Map(const std::string& path, const json::Array& wanted) {
    int file = open(path.c_str(), O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) Refuse(path, std::strerror(errno));
    size_t size = static_cast<size_t>(status.st_size);
    uint64_t length = 0;
    if (size < sizeof(length)) Refuse(path, "the file is truncated; copy the artifact again.");
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED) Refuse(path, std::strerror(errno));
    close(file);
    char* bytes = static_cast<char*>(memory);
    std::memcpy(&length, bytes, sizeof(length));  // little-endian, as every machine this is compiled for
    if (length > size - sizeof(length)) Refuse(path, "the file is truncated; copy the artifact again.");
    json::Object header = ParseObject(std::string(bytes + sizeof(length), length), path);
    char* data = bytes + sizeof(length) + length;
    uint64_t room = size - sizeof(length) - length;
    for (const ffi::Any& entry : wanted) {
      json::Object weight = entry.cast<json::Object>();
      std::string name = Field<ffi::String>(weight, "name", path);
      json::Object found = Field<json::Object>(header, name, path);
      std::vector<int64_t> span = Numbers(Field<json::Array>(found, "data_offsets", path));
      std::vector<int64_t> shape = Numbers(Field<json::Array>(weight, "shape", path));
      std::string dtype = Field<ffi::String>(weight, "dtype", path);
      if (span.size() != 2 || span[0] < 0 || span[1] < span[0] || static_cast<uint64_t>(span[1]) > room) {
        Refuse(path, "the file is truncated; copy the artifact again.");
      }
      ffi::Tensor tensor = NewTensor(shape, dtype, data + span[0]);
      if (ffi::GetDataSize(*tensor.GetDLTensorPtr()) != static_cast<size_t>(span[1] - span[0])) {
        Refuse(path, "the tensor '" + name + "' differs from the manifest; compile the artifact again.");
      }
      weights.push_back(tensor);
    }
  }
};
