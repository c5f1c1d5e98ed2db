#include "base/descriptor.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>

namespace collective {

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kAllreduce: return "allreduce";
    case Kind::kBroadcast: return "broadcast";
    case Kind::kAllgather: return "allgather";
    case Kind::kBarrier: return "barrier";
    case Kind::kBuckets: return "buckets";
    case Kind::kAlltoall: return "alltoall";
    case Kind::kReduceScatter: return "reducescatter";
    case Kind::kGather: return "gather";
    case Kind::kScatter: return "scatter";
    case Kind::kReduce: return "reduce";
    case Kind::kRefusal: return "refused call";
    case Kind::kPair: return "send or recv";
  }
  return "?";
}

bool rows_differ(Kind kind) {
  switch (kind) {
    case Kind::kAllgather:
    case Kind::kAlltoall:
    case Kind::kGather:
    case Kind::kScatter: return true;
    case Kind::kAllreduce:
    case Kind::kBroadcast:
    case Kind::kBarrier:
    case Kind::kBuckets:
    case Kind::kReduceScatter:
    case Kind::kReduce:
    case Kind::kRefusal:
    case Kind::kPair: return false;
  }
  return false;
}

size_t Descriptor::count() const {
  size_t count = 1;
  for (const int64_t extent : shape) count *= static_cast<size_t>(extent);
  return count;
}

std::string Descriptor::encode() const {
  Writer w;
  w.put(kind);
  w.put(dtype);
  w.put(wire);
  w.put(op);
  w.put(prescale);
  w.put(postscale);
  w.put(root);
  w.put_text(device);
  w.put_text(layout);
  w.put_list(shape);
  w.put(static_cast<uint32_t>(buckets.size()));
  for (const BucketShape& bucket : buckets) {
    w.put(bucket.dtype);
    w.put(bucket.wire);
    w.put(bucket.elements);
    w.put(bucket.flags);
    w.put(bucket.on_device);
  }
  w.put_text(site);
  return w.take();
}

Descriptor Descriptor::decode(std::string_view bytes) {
  Reader r(bytes);
  Descriptor d;
  d.kind = r.get<Kind>();
  d.dtype = r.get<DType>();
  d.wire = r.get<DType>();
  d.op = r.get<ReduceOp>();
  d.prescale = r.get<double>();
  d.postscale = r.get<double>();
  d.root = r.get<int32_t>();
  d.device = r.get_text();
  d.layout = r.get_text();
  d.shape = r.get_list<int64_t>();
  d.buckets.resize(r.get<uint32_t>());
  for (BucketShape& bucket : d.buckets) {
    bucket.dtype = r.get<DType>();
    bucket.wire = r.get<DType>();
    bucket.elements = r.get<size_t>();
    bucket.flags = r.get<size_t>();
    bucket.on_device = r.get<bool>();
  }
  d.site = r.get_text();
  return d;
}

std::string_view fusion_key(std::string_view encoded) {
  Reader r(encoded);
  r.get<std::array<char, 4>>();
  r.get<double>();
  r.get<double>();
  r.get<int32_t>();
  r.get_text();
  r.get_text();
  return encoded.substr(0, encoded.size() - r.remaining());
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i > 0 ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
  return text + (shape.size() == 1 ? ",)" : ")");
}

namespace {

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

struct Field {
  const char* name;
  std::function<std::string(const Descriptor&)> text;
};

// Its layout names an element type that is not one of ours.
bool moves_bytes(const Descriptor& d) {
  return !d.layout.empty() && (rows_differ(d.kind) || d.kind == Kind::kBroadcast || d.kind == Kind::kPair);
}

const std::vector<Field>& fields() {
  static const std::vector<Field> all = {
      {"operation", [](const Descriptor& d) { return std::string(name_of(d.kind)); }},
      {"dtype", [](const Descriptor& d) { return moves_bytes(d) ? d.layout : std::string(name_of(d.dtype)); }},
      {"shape", [](const Descriptor& d) { return shape_text(d.shape); }},
      {"reduction", [](const Descriptor& d) { return std::string(name_of(d.op)); }},
      {"compression", [](const Descriptor& d) { return std::string(d.wire == d.dtype ? "none" : name_of(d.wire)); }},
      {"prescale_factor", [](const Descriptor& d) { return number_text(d.prescale); }},
      {"postscale_factor", [](const Descriptor& d) { return number_text(d.postscale); }},
      {"device", [](const Descriptor& d) { return d.device; }},
  };
  return all;
}

std::string line(const std::string& text, size_t number) {
  size_t begin = 0;
  for (; number > 0; --number) {
    begin = text.find('\n', begin);
    if (begin == std::string::npos) return "nothing";
    ++begin;
  }
  const std::string found = text.substr(begin, text.find('\n', begin) - begin);
  return found.empty() ? "nothing" : found;
}

// The first line that differs between the layouts.
size_t differing_line(const std::vector<Variant>& variants) {
  size_t first = SIZE_MAX;
  if (moves_bytes(Descriptor::decode(variants[0].encoded)) || moves_bytes(Descriptor::decode(variants[1].encoded)))
    return first;
  const std::string reference = Descriptor::decode(variants[0].encoded).layout;
  for (const Variant& variant : variants) {
    const std::string layout = Descriptor::decode(variant.encoded).layout;
    const auto [a, b] = std::mismatch(reference.begin(), reference.end(), layout.begin(), layout.end());
    if (a == reference.end() && b == layout.end()) continue;
    first = std::min(first, static_cast<size_t>(std::count(reference.begin(), a, '\n')));
  }
  return first;
}

}  // namespace

std::string describe_difference(const std::vector<Variant>& variants, const RankNames& names) {
  std::vector<Field> all = fields();
  all.push_back({"root_rank", [&names](const Descriptor& d) { return std::to_string(names.job_rank(d.root)); }});
  all.push_back({"call site", [](const Descriptor& d) { return d.site; }});
  const size_t number = differing_line(variants);
  all.insert(all.begin() + 1,
             {"parameter", [number](const Descriptor& d) { return number == SIZE_MAX ? "" : line(d.layout, number); }});
  for (const Field& field : all) {
    // Variants that differ elsewhere may share this field: gather the ranks by its value.
    std::vector<std::pair<std::string, std::vector<int>>> values;
    for (const Variant& variant : variants) {
      const std::string value = field.text(Descriptor::decode(variant.encoded));
      auto known = std::find_if(values.begin(), values.end(), [&](const auto& v) { return v.first == value; });
      if (known == values.end()) known = values.insert(values.end(), {value, {}});
      known->second.insert(known->second.end(), variant.ranks.begin(), variant.ranks.end());
    }
    if (values.size() < 2) continue;
    std::string text = std::string(field.name) + " differs: ";
    for (size_t i = 0; i < values.size(); ++i) {
      text += (i > 0 ? "; " : "") + values[i].first + " on " + names.text_of(values[i].second);
    }
    return text;
  }
  return "descriptors differ";
}

}  // namespace collective
