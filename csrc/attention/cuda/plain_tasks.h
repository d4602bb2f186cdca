// Which task a block of the fast paths takes.
#pragma once

#include "attention/cuda/params.h"
#include "common/divisor.h"
#include "cuda/launch.h"

namespace vitkernels {

// A tile of one head's queries and a split of the keys, or the other way round.
struct PlainTask {
  int batch, head, kv_head, tile, split;
};

// The launch grid: tiles vary fastest. 64-bit divisions by run-time counts would take hundreds of instructions.
struct PlainTasks {
  int num_tiles, heads, batch, splits, heads_of_group;
  bool batch_is_inner;  // blocks beside each other read the same bias
  Divisor by_tiles{num_tiles}, by_heads{heads}, by_batch{batch}, by_splits{splits}, by_group{heads_of_group};

  __device__ PlainTask task(int index) const {
    PlainTask task;
    task.tile = take(index, num_tiles, by_tiles);
    if (batch_is_inner) task.batch = take(index, batch, by_batch);
    task.head = take(index, heads, by_heads);
    if (!batch_is_inner) task.batch = take(index, batch, by_batch);
    task.split = index;
    task.kv_head = by_group.divide(task.head);
    return task;
  }

  // Only the tile of a task.
  __device__ int tile(int index) const { return take(index, num_tiles, by_tiles); }

  // The head's place among those that share keys.
  __device__ int member(const PlainTask& task) const { return task.head - task.kv_head * heads_of_group; }

  // The first of `count` tiles that belongs to a split.
  __device__ int first_of_split(int count, int split) const { return by_splits.divide(count * split); }

 private:
  static __device__ int take(int& index, int count, const Divisor& divisor) {
    const int rest = divisor.divide(index), coordinate = index - rest * count;
    index = rest;
    return coordinate;
  }
};

inline PlainTasks plain_tasks(const Problem& p, int64_t num_tiles, int64_t splits) {
  return {.num_tiles = int(num_tiles),
          .heads = int(p.heads),
          .batch = int(p.batch),
          .splits = int(splits),
          .heads_of_group = int(p.heads / p.kv_heads),
          .batch_is_inner = p.score.bias.data && p.score.bias.strides.batch == 0};
}

}  // namespace vitkernels
