//! Quantized tensors of Burn's CPU backend.

use burn::backend::flex::{FlexQTensor, FlexTensor};
use burn::backend::{BackendTensor, DispatchTensorKind, TensorMetadata};
use burn::tensor::{DType, Tensor, TensorData};

/// See [`crate::compact`].
pub fn compact(weight: Tensor<2>) -> Tensor<2> {
    let mut weight = weight.into_dispatch();
    let quantized = match &mut weight.kind {
        DispatchTensorKind::Flex(BackendTensor::Quantized(quantized)) => quantized,
        _ => return Tensor::from_dispatch(weight),
    };
    let DType::QFloat(scheme) = quantized.dtype() else {
        return Tensor::from_dispatch(weight);
    };
    // `quantize_data` makes no second level of scales.
    if scheme.num_levels() == 1 && quantized.tensor().is_contiguous() {
        let count = quantized.shape().num_elements();
        let integers = quantized.tensor().storage::<i8>()[..count].to_vec();
        let data = TensorData::new(integers, quantized.shape());
        let scales = quantized.scales().to_vec();
        *quantized = FlexQTensor::new(FlexTensor::from_data(data), scheme, scales, None);
    }
    Tensor::from_dispatch(weight)
}
