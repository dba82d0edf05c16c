"""The operators that are meant to go to ATen, each with the reason; every other extern is a fallback."""

from __future__ import annotations

from typing import Any

from minifuse import compat

_MATMUL = "a matrix multiplication: bound by compute, and a tuned library does it best"
_CONVOLUTION = "a convolution: bound by compute, and a tuned library does it best"
_ATTENTION = "fused attention: ATen keeps the scores out of memory"
_GRADIENT_OF_GATHER = "a scatter with collisions: ATen adds the rows of one index in a fixed order"
_HOST = "numbers that are no tensors, and checks of them: done by the host"
_TRANSFER = "rematerialisation keeps a value in the host's memory between the passes"
_EFFECT = "an effect on torch's state or on other processes: run once, in its place"
_BOOKKEEPING = "torch's own bookkeeping, which no graph holds, or a form that it decomposes before"


def _by_name(reasons: dict[str, str]) -> dict[str, str]:
    """`namespace::name` (aten's without the namespace) -> reason."""
    return {n if "::" in n else f"aten::{n}": reason for reason, names in reasons.items() for n in names.split()}


# What is meant to go to ATen, by the operator without its overload.
EXPECTED = _by_name({
    _MATMUL: """mm bmm addmm baddbmm addbmm addmv mv dot vdot linear linear_backward matmul _addmm_activation _scaled_mm
        _scaled_mm_v2 _grouped_mm _scaled_grouped_mm _int_mm _foreach_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu
        _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm _convert_weight_to_int4pack
        _convert_weight_to_int4pack_for_cpu _dyn_quant_matmul_4bit _dyn_quant_pack_4bit_weight matmul_backward
        _trilinear _mixed_dtypes_linear _scaled_grouped_mm_v2 mkldnn::_linear_pointwise""",
    _CONVOLUTION: """convolution convolution_backward convolution_overrideable _convolution cudnn_convolution
        _slow_conv2d_forward _conv_depthwise2d conv_depthwise3d conv_tbc convolution_backward_overrideable
        slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
        _nnpack_spatial_convolution""",
    _ATTENTION: " ".join(f"_scaled_dot_product_{kind}{end}" for kind in
        ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
         "fused_attention_overrideable") for end in ("", "_backward")) +
        """ _scaled_dot_product_flash_attention_backward _flash_attention_forward _flash_attention_backward
        _efficient_attention_forward _efficient_attention_backward _scaled_dot_product_attention_math_for_mps
        _native_multi_head_attention _transformer_encoder_layer_fwd""",
    _GRADIENT_OF_GATHER: "embedding_dense_backward _embedding_bag_dense_backward",
    _HOST: """_local_scalar_dense item _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size
        _functional_assert_async _functional_sym_constrain_range _functional_sym_constrain_range_for_size
        _make_dep_token _functional_assert_scalar""",
    _EFFECT: "minifuse::seed",
    _TRANSFER: "minifuse::offload minifuse::offloaded minifuse::reload minifuse::reloaded",
})  # fmt: skip

# What has no kernel, and why; the report counts these as fallbacks.
FALLBACKS = _by_name({
    "an order of data: sorting and selection are no arithmetic by element": """sort topk kthvalue mode median nanmedian
        searchsorted bucketize unique_consecutive unique_dim unique_dim_consecutive histogram _histogramdd_bin_edges
        _histogramdd_from_bin_cts _histogramdd_from_bin_tensors _unique _unique2 histc bincount""",
    "a size that depends on data": "nonzero nonzero_static masked_select repeat_interleave",
    "linear algebra: LAPACK's": """linalg_lstsq _compute_linear_combination _linalg_det _linalg_eigh _linalg_eigvals
        _linalg_slogdet _linalg_solve_ex _linalg_svd cholesky cholesky_inverse cholesky_solve _cholesky_solve_helper
        geqrf linalg__powsum linalg_cholesky_ex linalg_eig linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex
        linalg_ldl_solve linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_pinv linalg_qr
        linalg_solve_triangular lu_unpack ormqr triangular_solve""",
    "a Fourier transform, and complex numbers: ATen's": """_fft_c2c _fft_c2r _fft_r2c complex polar angle _conj
        view_as_complex view_as_real""",
    "distances of all pairs: a matrix multiplication at heart": """_cdist_forward _cdist_backward _pdist_forward
        _pdist_backward""",
    "a loss along paths of several lengths": "_ctc_loss _ctc_loss_backward",
    "a loss whose gradient ATen scatters": "multi_margin_loss_backward multilabel_margin_loss_backward",
    "a recurrence over steps of matrix multiplications: a tuned library's": """_cudnn_rnn miopen_rnn mkldnn_rnn_layer
        mkldnn_rnn_layer_backward _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl _thnn_fused_gru_cell
        _thnn_fused_gru_cell_backward quantized_gru quantized_lstm _pack_padded_sequence""",
    "numbers drawn by rejection, or without repetition": """_sample_dirichlet _dirichlet_grad _standard_gamma_grad
        binomial _standard_gamma poisson multinomial randperm _philox_key_fold_in _philox_key_split""",
    "random numbers by torch's own generator, as asked": """bernoulli cauchy exponential geometric log_normal normal
        normal_functional rand rand_like randint randint_like randn randn_like uniform rrelu_with_noise_functional
        _fused_dropout native_dropout""",
    "a special function: no vector library has it": """digamma erfinv gcd lcm i0 igamma igammac lgamma nextafter frexp
        polygamma special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
        special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_erfcx special_hermite_polynomial_h special_hermite_polynomial_he
        special_i0e special_i1 special_i1e special_laguerre_polynomial_l special_legendre_polynomial_p
        special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1
        special_ndtri special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
        special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
        special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0
        special_zeta""",
    "a gather whose gradient is a scatter of weighted neighbours": """grid_sampler_2d grid_sampler_2d_backward
        grid_sampler_3d grid_sampler_3d_backward upsample_bicubic2d upsample_bicubic2d_backward _upsample_bicubic2d_aa
        _upsample_bicubic2d_aa_backward _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward _upsample_lanczos2d_aa
        _upsample_lanczos2d_aa_backward""",
    "rows of several lengths": """_embedding_bag _embedding_bag_backward _embedding_bag_forward_only
        _embedding_bag_per_sample_weights_backward _segment_reduce_backward segment_reduce
        _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward _nested_tensor_from_tensor_list
        _nested_view_from_buffer _nested_view_from_buffer_copy""",
    "windows drawn at random": """fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_backward
        fractional_max_pool3d_backward""",
    "made once, when the program begins": """bartlett_window blackman_window hamming_window kaiser_window fft_fftfreq
        fft_rfftfreq from_file range""",
    "scales that are learnt or watched in training": """_fake_quantize_learnable_per_channel_affine
        _fake_quantize_learnable_per_channel_affine_backward _fake_quantize_learnable_per_tensor_affine
        _fake_quantize_learnable_per_tensor_affine_backward _fused_moving_avg_obs_fq_helper_functional
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _amp_update_scale
        _amp_foreach_non_finite_check_and_unscale""",
    "a copy with borders: ATen copies whole rows": """reflection_pad1d reflection_pad2d reflection_pad3d
        reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d
        replication_pad2d replication_pad3d replication_pad1d_backward replication_pad2d_backward
        replication_pad3d_backward""",
    "a layout that is not strided": """_cslt_sparse_mm _sparse_coo_tensor_with_dims_and_tensors _sparse_log_softmax
        _sparse_semi_structured_addmm _sparse_semi_structured_linear _sparse_semi_structured_mm _sparse_softmax
        _sparse_sum _spdiags _to_dense sparse_coo_tensor quantize_per_tensor _lazy_clone""",
    "the same memory as another dtype": "view view_copy",
    "lists with numbers that the host would have to read": "_foreach_addcdiv _foreach_addcmul _foreach_powsum",
    "torch has no shape function for it": "_fused_adam _fused_adamw _fused_sgd _fused_adagrad",
    _BOOKKEEPING: """_add_relu _index_put_impl _masked_scale _pin_memory _resize_output lift resize _aminmax _conj_copy
        _conj_physical _copy_from _copy_from_and_resize _efficientzerotensor _foobar _fw_primal _fw_primal_copy
        _grid_sampler_2d_cpu_fallback _grid_sampler_2d_cpu_fallback_backward _logcumsumexp _make_dual _make_dual_copy
        _masked_softmax _masked_softmax_backward _neg_view _neg_view_copy _new_zeros_with_same_feature_meta
        _reshape_alias_copy _stack _transform_bias_rescale_qkv batch_norm_backward_elemt batch_norm_backward_reduce
        batch_norm_elemt batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats
        batch_norm_update_stats detach_copy embedding_renorm glu_backward_jvp glu_jvp hash_tensor max_pool2d_backward
        native_norm put random select_copy set slice_copy slice_inverse split_copy view_as_complex_copy
        view_as_real_copy""",
})  # fmt: skip
# Families by how their names begin.
_BEGINNINGS = _by_name({
    _BOOKKEEPING: "_test_",
    "a layout that is not strided": """_sparse _nested sparse_ _to_sparse _coalesce _indices _values indices values
        ccol_ crow_ col_indices row_indices _convert_indices _cslt_ _spsolve hspmm resize_as_sparse copy_sparse
        to_padded_tensor""",
    "a quantised tensor of torch's own kind": """_empty_affine _empty_per_channel _make_per_ dequantize empty_quantized
        int_repr q_per_ quantize_ quantized_""",
    "another device's, or another library's layout": """_cudnn cudnn_ miopen_ mkldnn_ _mkldnn mps_ _mps _lstm_mps
        lstm_mps _triton to_mkldnn _philox""",
})  # fmt: skip
_EFFECT_NAMESPACES = ("_c10d_functional", "c10d", "_c10d_functional_autograd")


def expected(target: Any) -> str | None:
    """Why an operator is meant to run by ATen (or, where it has one, by its own code); None for a fallback."""
    if getattr(target, "__module__", "") in ("_operator", "math") or getattr(target, "__name__", "").startswith("sym_"):
        return _HOST
    if isinstance(target, compat.OpOverload):
        if target.namespace in _EFFECT_NAMESPACES:
            return _EFFECT
        return EXPECTED.get(target._schema.name)
    return None


def fallback(target: Any) -> str:
    """Why an operator that is not meant for ATen runs there, by its name."""
    name = target._schema.name if isinstance(target, compat.OpOverload) else ""
    return reason(name) or "no lowering for this operator"


def reason(name: str) -> str | None:
    """Why the operator `namespace::name` has no kernel, where that is known."""
    found = EXPECTED.get(name) or FALLBACKS.get(name)
    return found or next((why for begin, why in _BEGINNINGS.items() if name.startswith(begin)), None)
