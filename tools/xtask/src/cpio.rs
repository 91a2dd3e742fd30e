//! A writer of `newc` cpio archives, the format of a Linux initramfs.

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// An archive in memory. Paths are absolute paths of the machine that will unpack it; the
/// directories above an entry are made with it. Archives may be concatenated.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    seen: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &Path) {
        for above in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
            self.entry(above, DIRECTORY, &[]);
        }
    }

    /// Adds a regular file, executable or not.
    pub fn file(&mut self, path: &Path, executable: bool, content: &[u8]) {
        let permissions = if executable { 0o755 } else { 0o644 };
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.entry(path, REGULAR | permissions, content);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// Writes an entry unless there is one of that name; the root is never written.
    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) {
        let name = path.to_string_lossy();
        let name = name.trim_start_matches('/');
        if !name.is_empty() && self.seen.insert(name.to_string()) {
            self.record(name, mode, content);
        }
    }

    fn record(&mut self, name: &str, mode: u32, content: &[u8]) {
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize
        // check: a link count of 1 keeps inode numbers from meaning anything.
        let length = u32::try_from(content.len()).expect("a file in the lab is under 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        let header = [0, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_brings_its_directories_once() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/c"), true, b"hello");
        archive.file(Path::new("/a/b/d"), false, b"");
        archive.file(Path::new("/a/b/c"), false, b"a second one of that name");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5, "a, a/b, c, d, trailer");
        assert_eq!(bytes.len() % 4, 0);
        assert!(text.contains("a/b/c\0hello\0"));
        assert!(!text.contains("a second one"));
    }

    #[test]
    fn header_fields_are_where_the_kernel_looks() {
        let mut archive = Archive::default();
        archive.file(Path::new("/x"), true, b"abc");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081ed", "mode 0100755");
        assert_eq!(&bytes[54..62], b"00000003", "file size");
        assert_eq!(&bytes[94..102], b"00000002", "name size with its NUL");
        assert_eq!(&bytes[110..112], b"x\0");
        assert_eq!(&bytes[112..115], b"abc");
    }
}
