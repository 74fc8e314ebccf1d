// Launches, for op files that do not include CUDA. Each returns CUDA's error message, or nullptr.
#pragma once

#include "parameters.h"

namespace memkern {

// `edits` is one tensor, or K and V; plan.count and plan.width are at least 1. `stream` is a cudaStream_t.
template <typename T>
const char* launch_edit_rows(const EditRows<T>* edits, int tensors, const EditPlan& plan, int device,
                             void* stream);

// embed.count and embed.width are at least 1.
template <typename T>
const char* launch_embed_tokens(const EmbedTokens<T>& embed, int device, void* stream);

}  // namespace memkern
