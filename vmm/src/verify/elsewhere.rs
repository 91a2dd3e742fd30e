//! What is taken apart in one kernel, put together in another.
//!
//! The program plays its scene below the guest's checkpointer (`tools/checkpoint`). When the host rings, its auditor
//! takes the target's state, and then asks to be written to a file: with that state, with the partner wherever it is,
//! and with all objects. A second machine, of another configuration, reads the file. There the auditor goes on: it
//! destroys the target, makes it again from the state, and the scene comes to its end.

use std::fs;
use std::path::PathBuf;

use fluke_abi::audit::{ELSEWHERE, Outcome};
use tempfile::TempDir;

use super::cell::{Cell, PROGRAM, SLOWNESS};
use super::explorer::{End, SETTING_PATIENCE, play_out};
use super::state::difference;
use crate::checkpoint::{self, Checkpoints};
use crate::config::{Configuration, VmConfig};
use crate::error::Error;
use crate::vm::Vm;

/// Memory of either machine, bytes: the checkpointer holds the program twice.
const MEMORY: u64 = 64 << 20;

/// The other machine.
pub struct Elsewhere {
    configuration: Configuration,
    directory: TempDir,
}

impl Elsewhere {
    /// One of that configuration.
    ///
    /// # Errors
    /// If there is no place for the file.
    pub fn new(configuration: Configuration) -> Result<Self, Error> {
        let directory = tempfile::tempdir().map_err(Error::host("making a temporary directory"))?;
        Ok(Self {
            configuration,
            directory,
        })
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("scene")
    }

    /// The machine that plays a cell's scene so that it can be written to the file.
    ///
    /// # Errors
    /// If there is no such kernel or program.
    pub fn machine(&self, cell: &Cell) -> Result<VmConfig, Error> {
        let args = [cell.scene.clone(), ELSEWHERE.into()];
        let checkpoints = Checkpoints {
            to: &self.file(),
            after: None,
        };
        let kernel = cell.configuration;
        let config = checkpoint::run(kernel, PROGRAM, &args, Vec::new(), &checkpoints)?;
        Ok(config.memory(MEMORY).slower(SLOWNESS))
    }

    /// Lets what is in the file go on in the other machine; what is wrong with its end, which must be the
    /// undisturbed one.
    ///
    /// # Errors
    /// If the host fails.
    pub fn goes_on(&self, undisturbed: &Outcome) -> Result<Option<String>, Error> {
        let kernel = self.configuration;
        let file = fs::read(self.file()).map_err(Error::host("reading a checkpoint"))?;
        let config = checkpoint::restore(kernel, "scene", file, None)?;
        let mut vm = Vm::new(config.memory(MEMORY).slower(SLOWNESS))?;
        let what = match play_out(&mut vm, SETTING_PATIENCE).0 {
            End::Done(outcome) => difference(&outcome, undisturbed),
            End::Stopped(stop) => Some(stop.to_string()),
            End::Hangs => Some("the scene hangs".into()),
        };
        Ok(what.map(|what| format!("gone on in {kernel}: {what}")))
    }
}
