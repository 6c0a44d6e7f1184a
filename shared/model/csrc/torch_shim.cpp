// Operators and settings of libtorch that its Rust bindings do not have.
//
// Everything goes through the dispatcher, so this links with the CPU library only. Tensors cross as `at::Tensor *`: borrowed as
// arguments, owned by the caller as results. No exception leaves a function; its text goes to a buffer.

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace {

struct Text {
    char *bytes;
    size_t capacity;

    void set(const std::string &text) const {
        if (capacity == 0) return;
        const size_t length = std::min(text.size(), capacity - 1);
        std::memcpy(bytes, text.data(), length);
        bytes[length] = 0;
    }
};

// Runs `work`; on an exception its text goes to `error` and the result is `failed`.
template <typename Result, typename Work>
Result guarded(Text error, Result failed, Work work) {
    try {
        return work();
    } catch (const std::exception &exception) {
        error.set(exception.what());
    } catch (...) {
        error.set("an exception without a text");
    }
    return failed;
}

}  // namespace

extern "C" {

// Schema of an operator as the running libtorch has it; 1 if it has a kernel for CUDA, 0 if not, -1 with a text if there is no
// such operator.
int grail_operator_schema(const char *name, char *schema, size_t schema_size, char *error, size_t error_size) {
    return guarded(Text{error, error_size}, -1, [&] {
        const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
        if (!found) throw std::runtime_error(std::string("libtorch has no operator ") + name);
        Text{schema, schema_size}.set(c10::toString(found->schema()));
        return found->hasKernelForDispatchKey(c10::DispatchKey::CUDA) ? 1 : 0;
    });
}

// Causal attention of sequences that lie end to end; with fewer queries than keys the last ones are aligned.
at::Tensor *grail_flash_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                                  const at::Tensor *query_offsets, const at::Tensor *key_offsets, int64_t most_queries,
                                  int64_t most_keys, double scale, char *error, size_t error_size) {
    return guarded<at::Tensor *>(Text{error, error_size}, nullptr, [&] {
        auto result = at::_flash_attention_forward(*query, *key, *value, *query_offsets, *key_offsets, most_queries, most_keys,
                                                   /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false, scale);
        return new at::Tensor(std::move(std::get<0>(result)));
    });
}

// The same by the memory-efficient kernel: `[1, tokens, heads, head_dim]`, as many heads of keys and values as of queries.
at::Tensor *grail_efficient_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                                      const at::Tensor *query_offsets, const at::Tensor *key_offsets, int64_t most_queries,
                                      int64_t most_keys, double scale, char *error, size_t error_size) {
    return guarded<at::Tensor *>(Text{error, error_size}, nullptr, [&] {
        constexpr int64_t causal_from_the_bottom_right = 2;
        auto result = at::_efficient_attention_forward(*query, *key, *value, /*bias=*/std::nullopt, *query_offsets, *key_offsets,
                                                       most_queries, most_keys, /*dropout_p=*/0.0, causal_from_the_bottom_right,
                                                       /*compute_log_sumexp=*/false, scale);
        return new at::Tensor(std::move(std::get<0>(result)));
    });
}

// Numbers on a GPU, copied from pinned memory: the copy takes its place in the stream, and nobody waits.
at::Tensor *grail_upload(const int32_t *values, int64_t count, int device, char *error, size_t error_size) {
    return guarded<at::Tensor *>(Text{error, error_size}, nullptr, [&] {
        const at::Tensor pinned = at::empty({count}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
        std::memcpy(pinned.mutable_data_ptr(), values, static_cast<size_t>(count) * sizeof(int32_t));
        const c10::Device to(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
        return new at::Tensor(pinned.to(to, at::kInt, /*non_blocking=*/true));
    });
}

// Page-locked memory of the host; freed, it is kept for the next who asks.
at::Tensor *grail_pinned(int64_t bytes, char *error, size_t error_size) {
    return guarded<at::Tensor *>(Text{error, error_size}, nullptr, [&] {
        return new at::Tensor(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true)));
    });
}

// The CUDA stream that libtorch's operations go to on this thread; the default stream is null, so success is the result.
int grail_current_stream(int device, void **stream, char *error, size_t error_size) {
    return guarded(Text{error, error_size}, -1, [&] {
        const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
        *stream = guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))).native_handle();
        return 0;
    });
}

// Directs what this thread orders on a GPU to the stream for loading, one for each GPU, on which no proof waits; `before` gets the
// number of the stream that it went to.
int grail_enter_loading_stream(int device, int64_t *before, char *error, size_t error_size) {
    return guarded(Text{error, error_size}, -1, [&] {
        static std::mutex mutex;
        static std::map<int, c10::Stream> streams;
        at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
        const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
        const std::lock_guard<std::mutex> lock(mutex);
        auto found = streams.find(device);
        if (found == streams.end()) {
            const c10::Device at(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
            found = streams.emplace(device, guard.getStreamFromGlobalPool(at, /*isHighPriority=*/false)).first;
        }
        *before = guard.exchangeStream(found->second).pack3().stream_id;
        return 0;
    });
}

// Waits for the stream that this thread's orders go to, and directs them to the stream `before` again.
int grail_leave_loading_stream(int device, int64_t before, char *error, size_t error_size) {
    return guarded(Text{error, error_size}, -1, [&] {
        const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
        const auto index = static_cast<c10::DeviceIndex>(device);
        const c10::Stream stream = guard.exchangeStream(c10::Stream::unpack3(before, index, c10::DeviceType::CUDA));
        stream.synchronize();
        return 0;
    });
}

// Matrix products in bfloat16 as Python's torch has them by default: split sums may be added in bfloat16.
int grail_default_matrix_products(char *error, size_t error_size) {
    return guarded(Text{error, error_size}, -1, [&] {
        at::globalContext().setAllowBF16ReductionCuBLAS(true);
        return 0;
    });
}

}  // extern "C"
