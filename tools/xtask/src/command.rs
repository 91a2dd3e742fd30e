//! The part of the initramfs that is one run's own: the program with its libraries, the files its
//! arguments name, and the script that starts it.
//!
//! Everything is carried in under its host path and the command starts in the host's working
//! directory, so arguments mean in the lab what they mean outside and are passed on as they are.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf, absolute};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cpio::Archive;

/// Where the script is that `/init` runs.
const SCRIPT: &str = "/lab/command";

/// Where the program is.
const PROGRAM: &str = "/lab/bin/flukevm";

/// The commands in what follows `--`: each its name and arguments.
pub fn commands(words: &[String]) -> impl Iterator<Item = &[String]> {
    words.split(|word| word == ";")
}

/// The archive for running the commands in `words` with `binary` as flukevm, and sending out the
/// file `fetch`.
pub fn archive(binary: &Path, words: &[String], fetch: Option<&Path>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file(Path::new(PROGRAM), true, &read(binary)?);
    let mut programs = vec![binary.to_path_buf()];
    let here = env::current_dir().context("no working directory")?;
    archive.directory(&here);
    for file in words.iter().flat_map(|word| files(word)) {
        let content = read(&file)?;
        archive.file(&absolute(&file)?, true, &content);
        if content.starts_with(b"\x7fELF") {
            programs.push(file);
        }
    }
    let libraries: Vec<_> = programs
        .iter()
        .map(|path| libraries(path))
        .collect::<Result<_>>()?;
    for library in libraries.into_iter().flatten().collect::<BTreeSet<_>>() {
        archive.file(&library, true, &read(&library)?);
    }
    let script = script(&here, words, fetch);
    archive.file(Path::new(SCRIPT), true, script.as_bytes());
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let content = fs::read(path).with_context(|| format!("cannot read {name}"))?;
    ensure!(
        u32::try_from(content.len()).is_ok(),
        "{name} does not fit the lab's initramfs: it is 4 GiB or more"
    );
    Ok(content)
}

/// The dynamic loader and the libraries of `binary`; none if it is static.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(binary)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run ldd")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("not a dynamic executable") || listing.contains("not a dynamic") {
            return Ok(Vec::new());
        }
        bail!("ldd {}: {}", binary.display(), said.trim());
    }
    parse_ldd(&listing)
}

/// Takes the paths from lines like `libc.so.6 => /lib/libc.so.6 (0x..)` and
/// `/lib64/ld-linux-x86-64.so.2 (0x..)`.
fn parse_ldd(listing: &str) -> Result<Vec<PathBuf>> {
    ensure!(
        !listing.contains("=> not found"),
        "a library of the program is missing here:\n{listing}"
    );
    let paths = listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// The host files an argument names: `PATH`, `NAME=PATH` or `--option=NAME=PATH`.
fn files(argument: &str) -> Vec<PathBuf> {
    let tails = argument
        .match_indices('=')
        .map(|(at, _)| &argument[at + 1..]);
    std::iter::once(argument)
        .chain(tails)
        .map(PathBuf::from)
        .filter(|path| path.is_file())
        .collect()
}

fn script(here: &Path, words: &[String], fetch: Option<&Path>) -> String {
    let mut script = String::from("export PATH=/lab/bin HOME=/root\n");
    for (name, value) in env::vars().filter(|(name, _)| passed_on(name)) {
        writeln!(script, "export {name}={}", quote(&value)).expect("strings take writes");
    }
    writeln!(script, "cd {}", quote(&here.to_string_lossy())).expect("strings take writes");
    let quoted = commands(words).map(|command| {
        let words: Vec<_> = command.iter().map(|word| quote(word)).collect();
        words.join(" ")
    });
    script += &quoted.collect::<Vec<_>>().join(" &&\n");
    script += "\nstatus=$?\n";
    if let Some(path) = fetch {
        let path = quote(&path.to_string_lossy());
        writeln!(script, "/lab/busybox cat {path} > /dev/vport0p4").expect("strings take writes");
    }
    script += "exit $status\n";
    script
}

/// Whether an environment variable means something to flukevm.
fn passed_on(name: &str) -> bool {
    name.starts_with("FLUKEVM_")
        || name.starts_with("RUST_") && name.ends_with("BACKTRACE")
        || name == "NO_COLOR"
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_every_spelling() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        for spelling in [
            path.to_string(),
            format!("a={path}"),
            format!("--file=a={path}"),
        ] {
            assert_eq!(files(&spelling), [file.path()], "{spelling}");
        }
        assert!(files("a=/nowhere").is_empty());
        assert!(files("/").is_empty(), "a directory is not carried");
    }

    #[test]
    fn ldd_is_understood() {
        let listing = "\tlinux-vdso.so.1 (0x7ffd)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let expected = ["/lib/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(listing).unwrap(), expected);
        assert!(parse_ldd("\tlibx.so => not found\n").is_err());
    }

    #[test]
    fn words_survive_the_shell() {
        let words = ["flukevm", "a b", "it's", ";", "flukevm", "$HOME"].map(String::from);
        let script = script(Path::new("/tmp"), &words, Some(Path::new("it's")));
        assert!(script.ends_with(
            "cd '/tmp'\n'flukevm' 'a b' 'it'\\''s' &&\n'flukevm' '$HOME'\nstatus=$?\n\
             /lab/busybox cat 'it'\\''s' > /dev/vport0p4\nexit $status\n"
        ));
    }
}
