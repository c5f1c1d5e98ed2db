// Control messages as bytes: all ranks of a job run on one architecture, so values are copied as they are.
#pragma once

#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/types.h"

namespace collective {

// The longest beginning of at most `nbytes` that ends between two characters of UTF-8.
inline std::string_view clipped(std::string_view text, size_t nbytes) {
  if (text.size() <= nbytes) return text;
  while (nbytes > 0 && (static_cast<unsigned char>(text[nbytes]) & 0xC0) == 0x80) --nbytes;
  return text.substr(0, nbytes);
}

class Writer {
 public:
  template <typename T>
  void put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void put_text(std::string_view text) {
    put(static_cast<uint32_t>(text.size()));
    bytes_.append(text);
  }
  template <typename T>
  void put_list(const std::vector<T>& values) {
    put(static_cast<uint32_t>(values.size()));
    for (const T& value : values) put(value);
  }
  bool empty() const { return bytes_.empty(); }
  std::string take() { return std::exchange(bytes_, {}); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}
  size_t remaining() const { return rest_.size(); }
  bool empty() const { return rest_.empty(); }
  template <typename T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::string get_text() { return std::string(take(get<uint32_t>())); }
  template <typename T>
  std::vector<T> get_list() {
    std::vector<T> values(get<uint32_t>());
    for (T& value : values) value = get<T>();
    return values;
  }

 private:
  std::string_view take(size_t nbytes) {
    if (nbytes > rest_.size()) throw Error(ErrorCode::kInternal, "a control message is cut short");
    const std::string_view part = rest_.substr(0, nbytes);
    rest_.remove_prefix(nbytes);
    return part;
  }
  std::string_view rest_;
};

}  // namespace collective
