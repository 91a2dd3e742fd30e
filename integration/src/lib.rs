//! What the end-to-end tests share: [`gate`], which kernel and program images must pass.

pub mod gate;
