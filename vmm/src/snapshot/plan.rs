//! Saving a machine while it runs: after a time, and whenever SIGUSR1 asks for it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::signal::unix::SignalKind;

use super::disk;
use crate::error::Error;
use crate::vm::{Outcome, Vm};

/// When a running machine is saved, and where.
#[derive(Clone, Debug)]
pub struct SavePlan {
    /// Directory of the snapshot; each save takes the place of the last one.
    pub directory: PathBuf,
    /// Once after this time, besides SIGUSR1.
    pub after: Option<Duration>,
}

impl SavePlan {
    /// Runs a machine to its end. It stands still while it is copied, and runs on while the copy
    /// is written. A save that fails is told in the log.
    ///
    /// # Errors
    /// If the host refuses to catch signals. Whatever the guest does is an [`Outcome`].
    pub fn run(&self, mut vm: Vm) -> Result<Outcome, Error> {
        vm.notice(SignalKind::user_defined1())?;
        vm.resume();
        let mut due = self
            .after
            .and_then(|after| Instant::now().checked_add(after));
        let stop = loop {
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            if let Some(stop) = vm.wait(left.unwrap_or(Duration::MAX)) {
                break stop;
            }
            due = due.filter(|due| Instant::now() < *due);
            match self.save(&mut vm) {
                Ok(()) => tracing::info!("saved in {}", self.directory.display()),
                Err(error) => tracing::error!("{error}"),
            }
        };
        if due.is_some() {
            tracing::warn!("the machine ended before it was to be saved");
        }
        Ok(vm.finish(stop))
    }

    fn save(&self, vm: &mut Vm) -> Result<(), Error> {
        let ran = vm.is_running();
        let snapshot = vm.snapshot();
        // One that somebody has paused stays so.
        if ran {
            vm.resume();
        }
        disk::save(&snapshot?, &self.directory)
    }
}
