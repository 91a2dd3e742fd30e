//! Machines whose program can be written to a file and brought back: what it takes to have the guest's own
//! checkpointer (`tools/checkpoint`) run it.
//!
//! The host only reads the file to refuse what cannot be restored before there is a machine, and to have the
//! clock go on. Everything else is done by programs in the guest.

use std::path::Path;
use std::time::Duration;

use fluke_checkpoint::format::Checkpoint;

use crate::config::{Configuration, Guest, GuestFile, VmConfig};
use crate::error::Error;
use crate::image;

/// The guest program.
const CHECKPOINTER: &str = "checkpoint";
/// Name of the file that it restores from.
const FILE: &str = "checkpoint";

/// Where checkpoints of a program go, and when one is taken besides those that the program asks for.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'a> {
    /// The file.
    pub to: &'a Path,
    /// When the program has run for so long.
    pub after: Option<Duration>,
}

impl Checkpoints<'_> {
    fn options(&self) -> Vec<String> {
        let after = self.after.map(|after| after.as_millis().to_string());
        after
            .into_iter()
            .flat_map(|ms| ["--after".into(), ms])
            .collect()
    }
}

/// A machine that runs a program, as [`VmConfig::fluke`], and writes checkpoints of it.
///
/// # Errors
/// As there.
pub fn run(
    configuration: Configuration,
    program: &str,
    args: &[String],
    files: Vec<GuestFile>,
    checkpoints: &Checkpoints<'_>,
) -> Result<VmConfig, Error> {
    let program = GuestFile::program(program)?;
    image::check_program(&program.name, &program.data)?;
    let mut words = vec!["run".into()];
    words.extend(checkpoints.options());
    words.push(program.name.clone());
    words.extend_from_slice(args);
    let mut config = VmConfig::fluke(configuration, CHECKPOINTER, &words)?;
    config.store = Some(checkpoints.to.into());
    Ok(with_files(config, [program].into_iter().chain(files)))
}

/// A machine in which the program in a checkpoint file of that name goes on, and which writes further
/// checkpoints of it.
///
/// # Errors
/// If the file is no checkpoint that can be restored here.
pub fn restore(
    configuration: Configuration,
    name: &str,
    file: Vec<u8>,
    checkpoints: Option<&Checkpoints<'_>>,
) -> Result<VmConfig, Error> {
    let checkpoint = Checkpoint::read(&file).map_err(|refusal| Error::Image {
        name: name.into(),
        why: format!("{refusal}; give a file that `flukevm run --checkpoint-to` has written"),
    })?;
    let clock = checkpoint.clock;
    let mut words = vec!["restore".into()];
    words.extend(
        checkpoints
            .iter()
            .flat_map(|checkpoints| checkpoints.options()),
    );
    words.push(FILE.into());
    let mut config = VmConfig::fluke(configuration, CHECKPOINTER, &words)?;
    config.clock = clock;
    config.store = checkpoints.map(|checkpoints| checkpoints.to.into());
    let file = GuestFile {
        name: FILE.into(),
        data: file,
    };
    Ok(with_files(config, [file]))
}

fn with_files(mut config: VmConfig, more: impl IntoIterator<Item = GuestFile>) -> VmConfig {
    if let Guest::Fluke { files, .. } = &mut config.guest {
        files.extend(more);
    }
    config
}
