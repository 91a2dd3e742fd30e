//! The command `flukevm image`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::read_files;
use crate::config::{
    Configuration, MEMORY_DEFAULT, Model, PROGRAM_DEFAULT, Preempt, Size, VmConfig, name_and_path,
};
use crate::error::Error;

/// Options of `flukevm image`.
#[derive(Debug, Args)]
#[command(after_help = "\
The image has a PVH note, and boots as a kernel under QEMU and other VMMs on a host like this one, with one CPU:

  qemu-system-x86_64 -M microvm,x-option-roms=off,pit=off,pic=off,rtc=off -bios qboot.rom \\
    -accel kvm -cpu host -m 80M -nodefaults -display none -no-reboot -serial stdio \\
    -device isa-debug-exit,iobase=0xf4,iosize=4 -kernel FILE

It wants at least 2 MiB more memory than --mem. QEMU ends with the exit status times two plus one.")]
pub struct ImageArgs {
    /// Number of vCPUs: 1, as there is no more that an image can start.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Memory that the machine is laid out for, such as 64M or 1G.
    #[arg(long, value_name = "SIZE", default_value_t = Size(MEMORY_DEFAULT))]
    mem: Size,
    /// Execution model of the kernel.
    #[arg(long, value_enum, default_value_t = Model::Interrupt)]
    model: Model,
    /// How far kernel code can be preempted.
    #[arg(long, value_enum, default_value_t = Preempt::None, value_name = "LEVEL")]
    preempt: Preempt,
    /// Hand a file to the guest under a name; may be repeated.
    #[arg(long, value_name = "NAME=PATH", value_parser = name_and_path)]
    file: Vec<(String, String)>,
    /// Where to write the image.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Name of a built-in guest program, or path of an ELF file built against libfluke; what
    /// follows are the program's own arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM [ARGS]",
          default_value = PROGRAM_DEFAULT)]
    program: Vec<String>,
}

/// Writes the image.
///
/// # Errors
/// As [`super::image`], and if a file cannot be read or written.
pub fn command(args: &ImageArgs) -> Result<u8, Error> {
    let configuration = Configuration::new(args.model, args.preempt)?;
    let (program, arguments) = args
        .program
        .split_first()
        .ok_or_else(|| Error::Config("no program to run; give the name of one".into()))?;
    let mut config = VmConfig::fluke(configuration, program, arguments)?;
    for file in read_files(&args.file)? {
        config = config.file(&file.name, file.data);
    }
    config.vcpus = args.vcpus;
    config.memory = args.mem.0;
    let image = super::image(&config)?;
    std::fs::write(&args.out, image).map_err(|source| Error::Write {
        path: args.out.clone(),
        source,
    })?;
    Ok(0)
}
