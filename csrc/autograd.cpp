// Autograd of the operators, without Python. The backward of rru_fast::<op> is rru_fast::<op>_backward, and the names
// in the two schemas say what it gets and returns:
//
//   an argument d_<output>      the gradient of that output, None if it is not used
//   an argument <output>        that output of the forward, saved
//   an argument <input>         that argument of the forward, saved
//   an argument <input>_sizes   the sizes of that argument, which is not saved
//   an argument need            one bool per result: whether it is needed
//   a result d_<input>          the gradient of that argument
//
// Outputs without a d_<output> are not differentiable. rru_fast/ops/_autograd.py has the same rules for an installation
// without these kernels.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace rru {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Where an argument of a backward comes from: the index is among the gradients that arrive, the forward's outputs, or
// its arguments, of which tensors are saved apart from the others.
struct Source {
  enum Kind { gradient, output, tensor, other, sizes, need } kind;
  int64_t index = -1;
};

// The derivative of one operator.
struct Derivative {
  OperatorHandle backward;
  std::vector<Source> sources;          // of the backward's arguments
  std::vector<int64_t> tensors;         // the forward's tensor arguments
  std::vector<int64_t> results;         // for each result of the backward, the index among `tensors`
  std::vector<int64_t> differentiable;  // outputs of the forward
  std::optional<int64_t> save;          // the argument without which nothing was saved for a backward

  static OperatorHandle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  }

  explicit Derivative(const std::string& name) : backward(find(name + "_backward")) {
    const auto& forward = find(name).schema();
    const auto position = [](const std::vector<c10::Argument>& of, const std::string& wanted) -> int64_t {
      const auto found = std::find_if(of.begin(), of.end(), [&](const auto& a) { return a.name() == wanted; });
      return found == of.end() ? -1 : found - of.begin();
    };
    for (size_t i = 0; i < forward.arguments().size(); i++) {
      if (forward.arguments()[i].type()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
        tensors.push_back(static_cast<int64_t>(i));
      }
    }
    const auto is_tensor = [&](int64_t index) {
      return std::find(tensors.begin(), tensors.end(), index) != tensors.end();
    };
    if (const int64_t index = position(forward.arguments(), "save"); index >= 0) {
      save = index;
    }
    for (const auto& argument : backward.schema().arguments()) {
      const std::string& wanted = argument.name();
      const std::string sized = wanted.substr(0, wanted.rfind("_sizes"));
      if (const int64_t index = position(forward.returns(), wanted); index >= 0) {
        sources.push_back({Source::output, index});
      } else if (const int64_t index = position(forward.arguments(), wanted); index >= 0) {
        sources.push_back({is_tensor(index) ? Source::tensor : Source::other, index});
      } else if (const int64_t index = position(forward.arguments(), sized); index >= 0) {
        sources.push_back({Source::sizes, index});
      } else if (wanted == "need") {
        sources.push_back({Source::need});
      } else {
        const bool prefixed = wanted.rfind("d_", 0) == 0;
        const int64_t output = prefixed ? position(forward.returns(), wanted.substr(2)) : -1;
        TORCH_CHECK(output >= 0, name, "_backward: got argument '", wanted, "', wanted a name of the forward");
        sources.push_back({Source::gradient, static_cast<int64_t>(differentiable.size())});
        differentiable.push_back(output);
      }
    }
    for (const auto& result : backward.schema().returns()) {
      const auto found = std::find_if(tensors.begin(), tensors.end(), [&](int64_t index) {
        return result.name() == "d_" + forward.arguments()[index].name();
      });
      TORCH_CHECK(
          found != tensors.end(), name, "_backward: got result '", result.name(), "', wanted d_ and a tensor's name");
      results.push_back(found - tensors.begin());
    }
  }

  static const Derivative& of(const std::string& name) {
    static const auto all = [] {
      std::unordered_map<std::string, Derivative> derivatives;
      for (const char* op : {"rru_fast::refine", "rru_fast::strip_pool", "rru_fast::batch_hard"}) {
        derivatives.emplace(op, Derivative(op));
      }
      return derivatives;
    }();
    return all.at(name);
  }
};

IValue optional(const Tensor& tensor) {
  return tensor.defined() ? IValue(tensor) : IValue();
}

// The Node's function: torch::autograd::CppNode calls its backward, and shows it to compiled autograd.
struct Function {
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Derivative& derivative = Derivative::of(ctx->saved_data.at("operator").toStringRef());
    variable_list found(derivative.tensors.size());
    if (std::none_of(gradients.begin(), gradients.end(), [](const Tensor& g) { return g.defined(); })) {
      return found;
    }
    const variable_list saved = ctx->get_saved_variables();
    Stack stack;
    stack.reserve(derivative.sources.size());
    size_t next_saved = 0;
    for (size_t i = 0; i < derivative.sources.size(); i++) {
      const Source& source = derivative.sources[i];
      if (source.kind == Source::gradient) {
        stack.push_back(optional(gradients[source.index]));
      } else if (source.kind == Source::output || source.kind == Source::tensor) {
        stack.push_back(optional(saved[next_saved++]));
      } else if (source.kind == Source::need) {
        c10::List<bool> need;
        for (const int64_t index : derivative.results) {
          need.push_back(ctx->needs_input_grad(index));
        }
        stack.emplace_back(std::move(need));
      } else {
        stack.push_back(ctx->saved_data.at(derivative.backward.schema().arguments()[i].name()));
      }
    }
    derivative.backward.callBoxed(stack);
    for (size_t i = 0; i < derivative.results.size(); i++) {
      if (ctx->needs_input_grad(derivative.results[i])) {
        found[derivative.results[i]] = stack[i].toTensor();
      }
    }
    return found;
  }

  // What `backward` reads, in its order.
  static void save(
      AutogradContext& ctx, const Derivative& derivative, const std::string& name, c10::ArrayRef<IValue> arguments,
      c10::ArrayRef<IValue> outputs) {
    variable_list saved;
    ctx.saved_data.emplace("operator", name);
    for (size_t i = 0; i < derivative.sources.size(); i++) {
      const Source& source = derivative.sources[i];
      const std::string& key = derivative.backward.schema().arguments()[i].name();
      if (source.kind == Source::output) {
        saved.push_back(outputs[source.index].toTensor());
      } else if (source.kind == Source::tensor) {
        const IValue& argument = arguments[source.index];
        saved.push_back(argument.isNone() ? Tensor() : argument.toTensor());
      } else if (source.kind == Source::other) {
        ctx.saved_data.emplace(key, arguments[source.index]);
      } else if (source.kind == Source::sizes) {
        ctx.saved_data.emplace(key, arguments[source.index].toTensor().sym_sizes());
      }
    }
    ctx.set_materialize_grads(false);
    ctx.save_for_backward(std::move(saved));
  }
};

struct Node : torch::autograd::CppNode<Function> {
  explicit Node(std::string name) : name_(std::move(name)) {}
  std::string name() const override {
    return name_;
  }

 private:
  const std::string name_;
};

// A node of the graph: nodes are counted by std::shared_ptr in PyTorch 2.11, by c10::intrusive_ptr in 2.14.
template <typename T, typename... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  } else {
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  }
}

// Below autograd, as PyTorch's own operators are called.
void call_below(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

variable_list tensors_of(c10::ArrayRef<IValue> values) {
  variable_list tensors;
  for (const IValue& value : values) {
    if (value.isTensor()) {
      tensors.push_back(value.toTensor());
    }
  }
  return tensors;
}

c10::ArrayRef<IValue> last(const Stack& stack, size_t count) {
  return c10::ArrayRef<IValue>(stack.data() + stack.size() - count, count);
}

bool any_requires_grad(const OperatorHandle& op, const Stack& stack) {
  const auto requires_grad = [](const IValue& v) { return v.isTensor() && v.toTensor().requires_grad(); };
  const auto arguments = last(stack, op.schema().arguments().size());
  return at::GradMode::is_enabled() && std::any_of(arguments.begin(), arguments.end(), requires_grad);
}

// The Autograd kernel of a forward.
void differentiate(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  for (const IValue& argument : last(*stack, op.schema().arguments().size())) {
    TORCH_CHECK(
        !argument.isTensor() || !torch::autograd::isFwGradDefined(argument.toTensor()), op.schema().name(),
        ": got a backend whose forward-mode and torch.func derivatives are not implemented, wanted "
        "backend='reference'");
  }
  if (!any_requires_grad(op, *stack)) {
    return call_below(op, keys, stack);
  }
  const std::string& name = op.schema().name();
  const Derivative& derivative = Derivative::of(name);
  const Stack arguments = last(*stack, op.schema().arguments().size()).vec();
  TORCH_CHECK(
      !derivative.save || arguments[*derivative.save].toBool(), name,
      ": got inputs that require gradients in a program that was exported under torch.no_grad(), wanted it called "
      "under torch.no_grad() too (save=False)");
  variable_list inputs;
  for (const int64_t index : derivative.tensors) {
    inputs.push_back(arguments[index].isNone() ? Tensor() : arguments[index].toTensor());
  }
  // Not torch::autograd::Function::apply, which refuses to run within vmap.
  const auto node = make_node<Node>(name + "_backward");
  node->set_ctx_grad_fn(node);
  node->is_variable_input_.assign(inputs.size(), true);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  call_below(op, keys, stack);
  const auto outputs = last(*stack, op.schema().returns().size());
  Function::save(node->ctx_, derivative, name, arguments, outputs);
  for (const int64_t index : derivative.differentiable) {
    torch::autograd::set_history(outputs[index].toTensor(), node);
  }
  node->save_variables_to_ctx();
}

// The Autograd kernel of a backward, which has no derivative.
void refuse_second_order(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (!any_requires_grad(op, *stack)) {
    return call_below(op, keys, stack);
  }
  const std::string name = op.schema().name().substr(0, op.schema().name().rfind("_backward"));
  const variable_list inputs = tensors_of(last(*stack, op.schema().arguments().size()));
  call_below(op, keys, stack);
  const auto node = make_node<torch::autograd::Error>(
      name + ": got a backend whose second-order gradients are not implemented, wanted backend='reference'",
      torch::autograd::collect_next_edges(inputs));
  for (const Tensor& result : tensors_of(last(*stack, op.schema().returns().size()))) {
    torch::autograd::set_history(result, node);
  }
}

TORCH_LIBRARY_IMPL(rru_fast, Autograd, m) {
  for (const char* op : {"refine", "strip_pool", "batch_hard"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&differentiate>());
    m.impl((std::string(op) + "_backward").c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_second_order>());
  }
}

}  // namespace
}  // namespace rru
