//! Observes Burn's fusion and CubeCL, and pairs launches with operations.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Device};
use burn_cubecl::cubecl::dry_run::DryRun;
use burn_cubecl::cubecl::logging::{LaunchObservation, LaunchObserver};
use burn_fusion::observer::{BlockOperations, FusionObservation, FusionObserver};
use burn_ir::{
    ActivationOperationIr, BaseOperationIr, CustomOpIr, FloatOperationIr, NumericOperationIr,
    OperationIr, TensorId, TensorIr, TensorStatus,
};

use crate::{Counts, Kind, Mode, reads};

/// As [`crate::count`], on a CubeCL device.
pub fn count<T>(device: &Device, mode: Mode, work: impl FnOnce() -> T) -> (T, Counts) {
    // Earlier work is not counted; all of `work` is.
    sync(device);
    let before = reads();
    let watch = Arc::new(Watch::default());
    let (value, reserved_bytes) = {
        let dry = (mode == Mode::DryRun).then(DryRun::new);
        let _fusion = FusionObservation::new(watch.clone());
        let _launches = LaunchObservation::new(watch.clone());
        let value = work();
        sync(device);
        drop(dry);
        let usage = device.memory_pool_usage();
        (value, usage.map_or(0, |usage| usage.bytes_reserved))
    };
    let mut counts = std::mem::take(&mut watch.lock().counts);
    counts.reads = reads() - before;
    counts.reserved_bytes = reserved_bytes;
    (value, counts)
}

fn sync(device: &Device) {
    if let Err(error) = device.sync() {
        panic!("the device failed while its work was counted: {error}");
    }
}

#[derive(Default)]
struct Watch(Mutex<State>);

#[derive(Default)]
struct State {
    counts: Counts,
    block: Option<Block>,
}

/// A group of operations that is launched.
struct Block {
    kind: Kind,
    bytes_read: u64,
    bytes_written: u64,
    flops: u64,
    /// Written and read again by every launch beyond the first.
    largest_between: u64,
    launches: u64,
    operations: String,
}

impl Watch {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LaunchObserver for Watch {
    fn launched(&self, kernel: &'static str) {
        let mut state = self.lock();
        match &mut state.block {
            Some(block) => block.launches += 1,
            None => {
                state.counts.kinds.entry(Kind::Other).or_default().launches += 1;
                *state.counts.details.entry(kernel.to_owned()).or_default() += 1;
            }
        }
    }
}

impl FusionObserver for Watch {
    fn registered(&self, operation: &OperationIr) {
        if let OperationIr::Init(init) = operation {
            let mut state = self.lock();
            state.counts.uploads += 1;
            state.counts.upload_bytes += bytes(&init.out);
        }
    }

    fn block_starts(&self, block: BlockOperations<'_>) {
        let operations: Vec<&OperationIr> = block.iter().collect();
        self.lock().block = Some(Block::new(&operations));
    }

    fn block_ran(&self) {
        let mut state = self.lock();
        let Some(block) = state.block.take().filter(|block| block.launches > 0) else {
            // A change of shape or strides, or a dropped tensor: no memory traffic.
            return;
        };
        let further = (block.launches - 1) * block.largest_between;
        let kind = state.counts.kinds.entry(block.kind).or_default();
        kind.launches += block.launches;
        kind.bytes_read += block.bytes_read + further;
        kind.bytes_written += block.bytes_written + further;
        kind.unfused_bytes += 2 * further;
        kind.flops += block.flops;
        let name = format!("{} × {}", block.launches, block.operations);
        *state.counts.details.entry(name).or_default() += 1;
    }
}

impl Block {
    fn new(operations: &[&OperationIr]) -> Self {
        let mut made: HashMap<TensorId, u64> = HashMap::new();
        let mut gone: HashSet<TensorId> = HashSet::new();
        let mut read: HashMap<TensorId, u64> = HashMap::new();
        let mut flops = 0;
        for operation in operations {
            if let OperationIr::Drop(tensor) = operation {
                gone.insert(tensor.id);
                continue;
            }
            if let Some(changed) = changes_a_part(operation) {
                let changed = bytes(changed);
                for tensor in operation
                    .inputs()
                    .filter(|tensor| !made.contains_key(&tensor.id))
                {
                    let known = read.entry(tensor.id).or_default();
                    *known = bytes(tensor).min(changed).max(*known);
                }
                for output in operation.outputs() {
                    made.insert(output.id, changed.min(bytes(output)));
                }
                continue;
            }
            let written: u64 = operation.outputs().map(bytes).sum();
            for (index, input) in operation.inputs().enumerate() {
                if made.contains_key(&input.id) {
                    if input.status == TensorStatus::ReadWrite {
                        gone.insert(input.id);
                    }
                    continue;
                }
                // Selections read what they return; a tensor that is added to is read and written
                // where it changes.
                let size = if index == 0 && reads_a_part(operation) {
                    bytes(input).min(written)
                } else {
                    bytes(input)
                };
                let known = read.entry(input.id).or_default();
                *known = size.max(*known);
            }
            for output in operation.outputs() {
                made.insert(output.id, bytes(output));
            }
            flops += product_flops(operation);
        }
        let between = made.iter().filter(|(id, _)| gone.contains(id));
        let largest_between = between.map(|(_, size)| *size).max();
        let largest_read = read.values().copied().max().unwrap_or(0);
        let kept = made.iter().filter(|(id, _)| !gone.contains(id));
        Self {
            kind: kind(operations),
            bytes_read: read.values().sum(),
            bytes_written: kept.map(|(_, size)| *size).sum(),
            flops,
            largest_between: largest_between.unwrap_or(largest_read),
            launches: 0,
            operations: names(operations),
        }
    }
}

/// A tensor's size on the device.
fn bytes(tensor: &TensorIr) -> u64 {
    let elements = tensor.shape.num_elements() as u64;
    match tensor.dtype {
        DType::QFloat(scheme) => {
            let block = scheme.block_size();
            let block = block.map_or(elements, |block| {
                block.iter().map(|extent| u64::from(*extent)).product()
            });
            let scales = elements.div_ceil(block.max(1));
            elements * scheme.size_bits_value() as u64 / 8 + 4 * scales
        }
        dtype => elements * dtype.size() as u64,
    }
}

fn reads_a_part(operation: &OperationIr) -> bool {
    use BaseOperationIr as Base;
    matches!(
        operation,
        OperationIr::BaseFloat(Base::Slice(_) | Base::Select(_) | Base::Gather(_))
            | OperationIr::BaseInt(Base::Slice(_) | Base::Select(_) | Base::Gather(_))
            | OperationIr::BaseBool(Base::Slice(_) | Base::Select(_) | Base::Gather(_))
    )
}

/// The bytes that an operation writes into a tensor that it changes in place.
fn changes_a_part(operation: &OperationIr) -> Option<&TensorIr> {
    use BaseOperationIr as Base;
    let (OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base)) =
        operation
    else {
        return None;
    };
    match base {
        Base::Scatter(operation) => Some(&operation.value),
        Base::SelectAssign(operation) => Some(&operation.value),
        Base::SliceAssign(operation) => Some(&operation.value),
        _ => None,
    }
}

fn product_flops(operation: &OperationIr) -> u64 {
    match operation {
        OperationIr::Float(_, FloatOperationIr::Matmul(product)) => {
            let inner = product.lhs.shape.iter().last().copied().unwrap_or(0);
            2 * product.out.shape.num_elements() as u64 * inner as u64
        }
        OperationIr::Custom(custom) => custom_flops(custom),
        _ => 0,
    }
}

/// Floating-point operations of a kernel of ours.
fn custom_flops(custom: &CustomOpIr) -> u64 {
    let elements = |tensor: &TensorIr| tensor.shape.num_elements() as u64;
    let first = &custom.inputs[0];
    match custom.id.as_str() {
        "tiled_attention" => 4 * attention_work(custom, &custom.outputs[1]),
        // Scores and the gradient of weights twice, and the three gradients.
        "tiled_attention_backward" => 14 * attention_work(custom, &custom.inputs[4]),
        "low_rank_gradients" => {
            let outputs: u64 = custom.outputs.iter().map(elements).sum();
            2 * outputs * first.shape[0] as u64
        }
        // Three factors, three weights; the first stands for those that are not there.
        "joint_product" => {
            let weights = custom.inputs[3..6].iter();
            let weights: BTreeMap<_, _> = weights
                .map(|weight| (weight.id, elements(weight)))
                .collect();
            2 * first.shape[0] as u64 * weights.values().sum::<u64>()
        }
        _ if kind_of_custom(custom) == Kind::Product => {
            2 * elements(&custom.outputs[0])
                * first.shape.iter().last().copied().unwrap_or(0) as u64
        }
        _ => 0,
    }
}

/// The pairs of a query and a visible key over all heads, times the width of a head. The number of pairs is the
/// operation's first number; `log_sums` is `[n, heads]`.
fn attention_work(custom: &CustomOpIr, log_sums: &TensorIr) -> u64 {
    let pairs: u64 = custom
        .scalars
        .first()
        .map_or(0, |pairs| pairs.elem::<i64>() as u64);
    let heads = log_sums.shape[1].max(1);
    pairs * (custom.inputs[0].shape[1] / heads) as u64
}

/// The kinds of the operations of backend extensions, by their names.
fn kind_of_custom(custom: &CustomOpIr) -> Kind {
    match custom.id.as_str() {
        "tiled_attention" | "tiled_attention_backward" => Kind::Attention,
        "low_rank_columns" | "low_rank_gradients" => Kind::Product,
        "rms_norm_rows" | "rms_norm_rows_backward" | "cross_entropy_rows" | "partial_squares" => {
            Kind::Reduction
        }
        "rotate_heads" | "swiglu_rows" | "swiglu_rows_backward" | "adamw_update" => {
            Kind::ElementWise
        }
        name if name.contains("product") => Kind::Product,
        _ => Kind::Other,
    }
}

/// The heaviest kind in a group of operations.
fn kind(operations: &[&OperationIr]) -> Kind {
    let kinds = operations.iter().filter_map(|operation| kind_of(operation));
    kinds.min().unwrap_or(Kind::Copy)
}

fn kind_of(operation: &OperationIr) -> Option<Kind> {
    use BaseOperationIr as Base;
    use NumericOperationIr as Numeric;
    Some(match operation {
        OperationIr::Drop(_) | OperationIr::Init(_) => return None,
        OperationIr::Float(_, FloatOperationIr::Matmul(_)) => Kind::Product,
        OperationIr::Custom(custom) => kind_of_custom(custom),
        OperationIr::Float(_, FloatOperationIr::Dequantize(_)) => Kind::Dequantize,
        OperationIr::Float(_, FloatOperationIr::Random(_)) => Kind::Other,
        OperationIr::Activation(
            ActivationOperationIr::Softmax(_)
            | ActivationOperationIr::LogSoftmax(_)
            | ActivationOperationIr::Softmin(_),
        ) => Kind::Reduction,
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => {
            match numeric {
                Numeric::MeanDim(_)
                | Numeric::Mean(_)
                | Numeric::Sum(_)
                | Numeric::SumDim(_)
                | Numeric::SumDims(_)
                | Numeric::Prod(_)
                | Numeric::ProdDim(_)
                | Numeric::ArgMax(_)
                | Numeric::ArgMin(_)
                | Numeric::Max(_)
                | Numeric::MaxDim(_)
                | Numeric::MaxDimWithIndices(_)
                | Numeric::MaxAbs(_)
                | Numeric::MaxAbsDim(_)
                | Numeric::Min(_)
                | Numeric::MinDim(_)
                | Numeric::MinDimWithIndices(_) => Kind::Reduction,
                _ => Kind::ElementWise,
            }
        }
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => {
            match base {
                Base::Reshape(_)
                | Base::SwapDims(_)
                | Base::Permute(_)
                | Base::Flip(_)
                | Base::Expand(_)
                | Base::Slice(_)
                | Base::SliceAssign(_)
                | Base::Select(_)
                | Base::SelectAssign(_)
                | Base::Gather(_)
                | Base::Scatter(_)
                | Base::RepeatDim(_)
                | Base::Cat(_) => Kind::Copy,
                _ => Kind::ElementWise,
            }
        }
        _ => Kind::ElementWise,
    })
}

/// The operations in their order, with the shape of the last output.
fn names(operations: &[&OperationIr]) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut runs: BTreeMap<usize, usize> = BTreeMap::new();
    let mut shape = String::new();
    for operation in operations {
        if matches!(operation, OperationIr::Drop(_)) {
            continue;
        }
        if let Some(output) = operation.outputs().last() {
            shape = format!(
                " → {:?} {:?}",
                output.shape.iter().collect::<Vec<_>>(),
                output.dtype
            );
        }
        let text = match operation {
            OperationIr::Custom(custom) => custom.id.clone(),
            operation => format!("{operation:?}"),
        };
        // `NumericFloat(F32, Add(BinaryOpIr { …`: the second word that starts a parenthesis.
        let name = text
            .split(['(', ' ', ','])
            .filter(|word| !word.is_empty())
            .find(|word| {
                ![
                    "BaseFloat",
                    "BaseInt",
                    "BaseBool",
                    "NumericFloat",
                    "NumericInt",
                    "Float",
                    "Int",
                    "Activation",
                ]
                .contains(word)
                    && word.chars().any(char::is_lowercase)
            })
            .unwrap_or("?")
            .to_owned();
        match names.last() {
            Some(last) if *last == name => *runs.entry(names.len() - 1).or_insert(1) += 1,
            _ => names.push(name),
        }
    }
    let named = names
        .iter()
        .enumerate()
        .map(|(index, name)| match runs.get(&index) {
            Some(times) => format!("{name}·{times}"),
            None => name.clone(),
        });
    named.collect::<Vec<_>>().join(" ") + &shape
}
