//! The static part of the lab, made once and cached: the kernel to boot and an initramfs with
//! busybox, the modules and `/init`. The part that varies is [`crate::command`]'s.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::{debian, modules};

/// Goes with everything that decides what is in the cache; another value makes it anew.
const EDITION: &str = "1";

/// Modules the lab needs: `/dev/kvm`, and the ports its output leaves by.
const MODULES: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_console", "kvm_amd"];

/// The script that runs as process 1. The port numbers are those of [`crate::qemu`].
const INIT: &str = include_str!("init.sh");

/// A kernel and the initramfs that every run shares.
pub struct Base {
    /// The kernel.
    pub kernel: PathBuf,
    /// The archive that [`crate::command`]'s is appended to.
    pub initramfs: PathBuf,
}

impl Base {
    /// Takes the base out of `cache`, or makes it there.
    pub fn get(cache: &Path) -> Result<Base> {
        fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("cannot lock the lab's cache")?;
        let directory = cache.join(format!("base-{EDITION}"));
        if !directory.exists() {
            make(cache, &directory)?;
        }
        Ok(Base {
            kernel: directory.join("kernel"),
            initramfs: directory.join("base.cpio"),
        })
    }
}

/// Makes the base in a temporary directory and moves it into place when it is complete.
fn make(cache: &Path, directory: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(cache)?;
    let package = debian::fetch_kernel(work.path())?;
    let busybox = debian::fetch_busybox(work.path())?;
    let base = work.path().join("base");
    fs::create_dir(&base)?;
    fs::write(base.join("base.cpio"), archive(&package, &busybox)?)?;
    fs::write(base.join("kernel"), kernel(&package)?)?;
    fs::rename(&base, directory)?;
    Ok(())
}

fn archive(package: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let tree = ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|path| package.join(path))
        .find(|path| path.is_dir())
        .context("the kernel package holds no modules")?;
    let mut archive = Archive::default();
    for directory in ["/dev", "/proc", "/sys", "/tmp", "/root", "/run"] {
        archive.directory(Path::new(directory));
    }
    archive.file(Path::new("/lab/busybox"), true, &fs::read(busybox)?);
    archive.file(Path::new("/init"), true, INIT.as_bytes());
    let mut order = String::new();
    for module in modules::collect(&tree, &MODULES)? {
        let path = format!("/lab/modules/{}.ko", module.name);
        archive.file(Path::new(&path), false, &module.bytes);
        order += &path;
        order.push('\n');
    }
    archive.file(Path::new("/lab/modules/order"), false, order.as_bytes());
    Ok(archive.finish())
}

/// The kernel as an uncompressed ELF file if it can be had, which an emulated machine boots
/// seconds sooner; as the package has it otherwise.
fn kernel(package: &Path) -> Result<Vec<u8>> {
    let image = fs::read_dir(package.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .context("the kernel package holds no vmlinuz")?;
    let image = fs::read(image)?;
    Ok(unpack(&image).unwrap_or(image))
}

/// Unpacks the xz payload of a bzImage, whose place the setup header tells.
fn unpack(image: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    let sectors = usize::from(*image.get(0x1f1)?);
    let offset = (sectors + 1) * 512 + usize::try_from(word(0x248)?).ok()?;
    let length = usize::try_from(word(0x24c)?).ok()?;
    let payload = image.get(offset..offset.checked_add(length)?)?;
    let packed = tempfile::NamedTempFile::new().ok()?;
    fs::write(packed.path(), payload).ok()?;
    // The payload ends in the unpacked size, which is not part of the stream.
    let output = Command::new("xz")
        .args(["-dc", "--single-stream"])
        .stdin(File::open(packed.path()).ok()?)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .stdout
        .starts_with(b"\x7fELF")
        .then_some(output.stdout)
}
