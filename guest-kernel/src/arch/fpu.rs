//! x87 and SSE registers of user threads. The kernel itself has none.

use fluke_abi::state::FPU_BYTES;

/// An `fxsave64` image. Where it is used it is aligned to 16 bytes.
#[derive(Clone, Copy)]
pub struct Fpu([u8; FPU_BYTES]);

/// Offset of MXCSR in the image (SDM vol. 1, table 10-2).
const MXCSR: usize = 24;
/// MXCSR bits that every CPU has; setting another makes `fxrstor64` fault.
const MXCSR_BITS: u32 = 0xffbf;

impl Fpu {
    /// Registers of a new thread: all exceptions masked, round to nearest.
    pub const INITIAL: Self = {
        let mut image = [0; FPU_BYTES];
        image[0] = 0x7f;
        image[1] = 0x03;
        image[MXCSR] = 0x80;
        image[MXCSR + 1] = 0x1f;
        Self(image)
    };

    /// The image, for export.
    pub const fn image(&self) -> &[u8; FPU_BYTES] {
        &self.0
    }

    /// Takes an image from a user, with what would fault removed. An image of zeroes, which is no
    /// state a CPU stores, stands for "unchanged".
    pub fn import(&mut self, image: &[u8; FPU_BYTES]) {
        if image.iter().all(|&byte| byte == 0) {
            return;
        }
        self.0 = *image;
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&self.0[MXCSR..MXCSR + 4]);
        let mxcsr = u32::from_le_bytes(mxcsr) & MXCSR_BITS;
        self.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    }

    /// Stores the CPU's registers.
    #[inline]
    pub fn save(&mut self) {
        // SAFETY: the image is 512 bytes, and aligned to 16 where threads keep it: an entity begins with it.
        unsafe {
            core::arch::asm!("fxsave64 [{}]", in(reg) &raw mut self.0, options(nostack, preserves_flags));
        };
    }

    /// Loads the CPU's registers.
    #[inline]
    pub fn restore(&self) {
        // SAFETY: as in `save`; `import` has removed what faults. No kernel code uses the registers.
        unsafe {
            core::arch::asm!("fxrstor64 [{}]", in(reg) &raw const self.0, options(nostack, preserves_flags));
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_imported_image_keeps_no_reserved_mxcsr_bit() {
        #[repr(align(16))]
        struct Aligned(Fpu);
        let mut aligned = Aligned(Fpu::INITIAL);
        let fpu = &mut aligned.0;
        fpu.import(&[0xff; FPU_BYTES]);
        assert_eq!(fpu.image()[MXCSR..MXCSR + 4], [0xbf, 0xff, 0, 0]);
        fpu.restore();
    }

    #[test]
    fn an_image_of_zeroes_changes_nothing() {
        let mut fpu = Fpu::INITIAL;
        fpu.import(&[0; FPU_BYTES]);
        assert_eq!(fpu.image(), Fpu::INITIAL.image());
    }
}
