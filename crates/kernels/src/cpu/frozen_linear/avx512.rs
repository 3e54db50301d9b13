//! Sums of products in AVX-512's registers, of f32 numbers or of pairs of bf16 numbers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::tiles::{Job, Scratch, Sums, Weight};

/// One register. With `BF16` its methods require AVX512-BF16, without it AVX-512 F and BW: see
/// [`super::bf16::is_supported`] and [`super::f32_tiles::is_supported`].
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(__m512);

// SAFETY of the intrinsics below: the processor has them, by the type's contract; loads read 16 elements through
// references to arrays of 16.
impl<const BF16: bool> Sums for Avx512<BF16> {
    const NUMBERS: usize = if BF16 { 2 } else { 1 };
    const CHUNK: usize = if BF16 { 4096 } else { 768 };

    // Callees are inlined into one of the two functions, so that the target features apply to them.
    fn columns<W: Weight>(
        job: &Job<Self, W>,
        tiles: Range<usize>,
        rows: Range<usize>,
        scratch: &mut Scratch,
    ) {
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn in_bf16<W: Weight, const BF16: bool>(
            job: &Job<Avx512<BF16>, W>,
            tiles: Range<usize>,
            rows: Range<usize>,
            scratch: &mut Scratch,
        ) {
            job.columns(tiles, rows, scratch);
        }
        #[target_feature(enable = "avx512f,avx512bw")]
        fn in_f32<W: Weight, const BF16: bool>(
            job: &Job<Avx512<BF16>, W>,
            tiles: Range<usize>,
            rows: Range<usize>,
            scratch: &mut Scratch,
        ) {
            job.columns(tiles, rows, scratch);
        }
        // SAFETY: as above.
        unsafe {
            if BF16 {
                in_bf16(job, tiles, rows, scratch)
            } else {
                in_f32(job, tiles, rows, scratch)
            }
        }
    }

    // Interleaves pairs of rows, then pairs of pairs, within quarters of a register; then moves the quarters.
    #[inline(always)]
    fn transposed(rows: [[u32; 16]; 16]) -> [[u32; 16]; 16] {
        // SAFETY: as above; 16 vectors are 16 rows of 16 words.
        unsafe {
            let r: [__m512i; 16] = std::mem::transmute(rows);
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            // u[4g + c]: in quarter q, column 4q + c of rows 4g to 4g + 3.
            let mut u = t;
            for g in 0..4 {
                let [a, b, c, d] = [t[4 * g], t[4 * g + 1], t[4 * g + 2], t[4 * g + 3]];
                u[4 * g] = _mm512_unpacklo_epi64(a, c);
                u[4 * g + 1] = _mm512_unpackhi_epi64(a, c);
                u[4 * g + 2] = _mm512_unpacklo_epi64(b, d);
                u[4 * g + 3] = _mm512_unpackhi_epi64(b, d);
            }
            let mut columns = u;
            for c in 0..4 {
                let [a, b, d, e] = [u[c], u[4 + c], u[8 + c], u[12 + c]];
                // Quarters 0 and 2, or 1 and 3, of two groups of rows each.
                let even = _mm512_shuffle_i32x4::<0x88>(a, b);
                let odd = _mm512_shuffle_i32x4::<0xdd>(a, b);
                let even_after = _mm512_shuffle_i32x4::<0x88>(d, e);
                let odd_after = _mm512_shuffle_i32x4::<0xdd>(d, e);
                columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even_after);
                columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_after);
                columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_after);
                columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_after);
            }
            std::mem::transmute(columns)
        }
    }

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    fn add_products(self, x: u32, weights: &[u32; 16]) -> Self {
        // SAFETY: as above; the vectors are 64 bytes without invalid values.
        unsafe {
            let x = _mm512_set1_epi32(x as i32);
            let weights = _mm512_loadu_epi32(weights.as_ptr().cast());
            Self(if BF16 {
                let x: __m512bh = std::mem::transmute(x);
                let weights: __m512bh = std::mem::transmute(weights);
                _mm512_dpbf16_ps(self.0, x, weights)
            } else {
                let x = _mm512_castsi512_ps(x);
                _mm512_fmadd_ps(x, _mm512_castsi512_ps(weights), self.0)
            })
        }
    }

    #[inline(always)]
    fn added_to(self, before: [f32; 16], scales: Option<&[f32; 16]>) -> [f32; 16] {
        // SAFETY: as above; a vector is 16 floats.
        unsafe {
            let before = _mm512_loadu_ps(before.as_ptr());
            let sums = match scales {
                Some(scales) => _mm512_fmadd_ps(self.0, _mm512_loadu_ps(scales.as_ptr()), before),
                None => _mm512_add_ps(self.0, before),
            };
            std::mem::transmute(sums)
        }
    }
}
