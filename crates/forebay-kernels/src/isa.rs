//! Which instruction set runs the kernels. Chosen at run time; all give the same bits.

use std::fmt;

use crate::simd::{Scalar, WithSimd};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512 F/BW/DQ/VL with VNNI: Cascade Lake, Zen 4 and later.
    Avx512Vnni,
    /// AVX2 with FMA and F16C: Haswell, Zen 1 and later.
    Avx2,
    /// Portable Rust. Correct everywhere, and slow on x86 for want of a fused multiply-add.
    Scalar,
}

impl Isa {
    pub const ALL: [Self; 3] = [Self::Avx512Vnni, Self::Avx2, Self::Scalar];

    /// The fastest one this CPU has.
    pub fn detect() -> Self {
        // The standard library caches CPUID; this is a few loads.
        Self::ALL.into_iter().find(|isa| isa.supported()).unwrap_or(Self::Scalar)
    }

    /// Whether this CPU and operating system can run it.
    pub fn supported(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => crate::simd::Avx512::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => crate::simd::Avx2::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Vnni | Self::Avx2 => false,
            Self::Scalar => true,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx2 => "avx2",
            Self::Scalar => "scalar",
        }
    }

    /// As [`Self::run`], for kernels that use [`crate::simd::Simd::dot_bf16`]: with the instruction that does it,
    /// where the CPU has that.
    #[inline]
    pub(crate) fn run_bf16<K: WithSimd>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512Vnni
            && let Some(simd) = crate::simd::Avx512::detect_bf16()
        {
            return simd.enter(kernel);
        }
        self.run(kernel)
    }

    /// Runs a kernel compiled for this instruction set, or portably where the CPU lacks it.
    #[inline]
    pub(crate) fn run<K: WithSimd>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => match crate::simd::Avx512::detect() {
                Some(simd) => simd.enter(kernel),
                None => kernel.with(Scalar),
            },
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => match crate::simd::Avx2::detect() {
                Some(simd) => simd.enter(kernel),
                None => kernel.with(Scalar),
            },
            _ => kernel.with(Scalar),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_one_is_supported_and_scalar_always_is() {
        assert!(Isa::detect().supported());
        assert!(Isa::Scalar.supported());
    }
}
