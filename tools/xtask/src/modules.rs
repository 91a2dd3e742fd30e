//! Kernel modules out of an unpacked kernel package, with what they depend on.
//!
//! `modules.dep` is made when the package is installed, and it is not; each module names its
//! dependencies itself, in its `.modinfo` section.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A loadable module.
pub struct Module {
    /// Name as the kernel knows it, `kvm_amd`.
    pub name: String,
    /// The ELF file, uncompressed.
    pub bytes: Vec<u8>,
}

/// The modules `wanted` and all they depend on, in an order in which they can be loaded.
pub fn collect(directory: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut paths = BTreeMap::new();
    index(directory, &mut paths)?;
    let mut order = Vec::new();
    for name in wanted {
        visit(name, &paths, &mut order)?;
    }
    Ok(order)
}

fn index(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            index(&path, paths)?;
        } else if let Some((stem, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            paths.insert(kernel_name(stem), path);
        }
    }
    Ok(())
}

fn visit(name: &str, paths: &BTreeMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<()> {
    if order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let path = paths
        .get(name)
        .with_context(|| format!("the kernel package has no module {name}"))?;
    let bytes = read(path)?;
    for dependency in depends(&bytes) {
        visit(&dependency, paths, order)?;
    }
    order.push(Module {
        name: name.to_string(),
        bytes,
    });
    Ok(())
}

/// Reads a module, unpacking it if it is compressed.
fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(path).with_context(|| path.display().to_string()),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{}: a module compressed in no known way", path.display()),
    };
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {tool}, which unpacks {}", path.display()))?;
    if !output.status.success() {
        bail!("{tool} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// The names in a module's `depends=` line.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(kernel_name)
        .collect()
}

fn kernel_name(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(directory: &Path, file: &str, depends: &str) {
        let text = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
        fs::write(directory.join(file), text).unwrap();
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("kernel");
        fs::create_dir(&deep).unwrap();
        module(&deep, "kvm-amd.ko", "kvm,ccp");
        module(&deep, "kvm.ko", "irqbypass");
        module(directory.path(), "ccp.ko", "");
        module(directory.path(), "irqbypass.ko", "");
        let order = collect(directory.path(), &["kvm", "kvm_amd"]).unwrap();
        let names: Vec<_> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
    }

    #[test]
    fn a_missing_module_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = collect(directory.path(), &["kvm"]).err().unwrap();
        assert_eq!(error.to_string(), "the kernel package has no module kvm");
    }
}
