// What a rank requests under a name: the part on which all ranks must agree, and how a disagreement is reported.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/codec.h"
#include "base/rank_names.h"
#include "base/types.h"

namespace collective {

enum class Kind : uint8_t {
  kAllreduce = 0,
  kBroadcast = 1,
  kAllgather = 2,
  kBarrier = 3,
  kBuckets = 4,  // opens a plan: buckets that run again and again without agreement
  kAlltoall = 5,
  kReduceScatter = 6,
  kGather = 7,
  kScatter = 8,
  kReduce = 9,
  kRefusal = 10,  // stands for a call that its rank has refused, so that it fails on the others too; `layout` says why
  kPair = 11,     // a send or its receive, which the two ranks compare
};
const char* name_of(Kind kind);
// Whether the first dimension may differ between ranks.
bool rows_differ(Kind kind);

// The part of a bucket's layout that a rank without it (one that has joined) needs to take part.
struct BucketShape {
  DType dtype, wire;
  size_t elements, flags;
  bool on_device;  // its tensors are
};

struct Descriptor {
  Kind kind = Kind::kBarrier;
  DType dtype = DType::kUInt8;
  DType wire = DType::kUInt8;
  ReduceOp op = ReduceOp::kSum;
  double prescale = 1.0, postscale = 1.0;
  int32_t root = 0;
  std::string device = "cpu";
  // For buckets: their tensors, one per line. For elements that move as bytes: the name of their type.
  std::string layout;
  // Where the first dimension may differ between ranks, it is -1 here and travels beside the descriptor.
  std::vector<int64_t> shape;
  std::vector<BucketShape> buckets;
  std::string site;  // where the script calls it; "" unless ranks are to compare that, too

  size_t count() const;
  // Equal bytes mean agreement. Everything that two tensors of one bucket must share comes before the shape.
  std::string encode() const;
  static Descriptor decode(std::string_view bytes);
};

// The bytes of an encoded descriptor that two tensors of one bucket share.
std::string_view fusion_key(std::string_view encoded);

// "shape differs: (2, 3) on ranks 0, 1; (2, 4) on rank 2": the first field in which the variants differ.
struct Variant {
  std::string encoded;
  std::vector<int> ranks;
};
std::string describe_difference(const std::vector<Variant>& variants, const RankNames& names);

std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace collective
