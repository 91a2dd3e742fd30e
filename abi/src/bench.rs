//! What a benchmark program (`benches/guest`) tells the host, by `machine_tell` with the address of a [`Mark`]:
//! where a piece of work begins and ends. A host that counts instructions looks at the kernel between the two.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes for the name of a piece of work, NUL-padded.
pub const NAME_BYTES: usize = 48;

/// [`Mark::news`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum News {
    /// The work begins.
    Begin = 1,
    /// It has ended.
    End = 2,
    /// Nothing more will be measured.
    Done = 3,
}

impl News {
    /// The news with number `n`.
    pub const fn from_number(n: u64) -> Option<Self> {
        match n {
            1 => Some(Self::Begin),
            2 => Some(Self::End),
            3 => Some(Self::Done),
            _ => None,
        }
    }
}

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mark {
    /// [`News`] number.
    pub news: u64,
    /// Operations that the work consists of.
    pub operations: u64,
    /// Its name.
    pub name: [u8; NAME_BYTES],
}

impl Mark {
    /// A mark; a longer name is cut.
    pub fn new(news: News, operations: u64, name: &str) -> Self {
        let mut bytes = [0; NAME_BYTES];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self {
            news: news as u64,
            operations,
            name: bytes,
        }
    }

    /// The name, if it is text.
    pub fn name(&self) -> Option<&str> {
        let bytes = self.name.split(|&byte| byte == 0).next()?;
        core::str::from_utf8(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_long_ones_are_cut() {
        assert_eq!(Mark::new(News::End, 3, "null").name(), Some("null"));
        let long = [b'x'; NAME_BYTES + 1];
        let long = core::str::from_utf8(&long).unwrap();
        assert_eq!(Mark::new(News::End, 3, long).name(), Some(&long[1..]));
        assert_eq!(News::from_number(News::Done as u64), Some(News::Done));
        assert_eq!(News::from_number(4), None);
    }
}
