//! Files as they are written, and as they should not be.

use super::*;
use alloc::string::ToString;
use alloc::vec;
use proptest::prelude::*;

const PAGE: usize = PAGE_SIZE as usize;

/// A page given, a page of a source, and two of heap, with a mutex and a reference to it.
fn catalogue() -> Catalogue {
    let at = |offset| Place {
        part: Part::Heap,
        offset,
    };
    Catalogue {
        given: vec![PAGE_SIZE],
        sources: vec![PAGE_SIZE],
        heap: 16 * PAGE_SIZE,
        heap_left: PAGE_SIZE,
        chunks: vec![
            Chunk {
                start: 0,
                size: PAGE_SIZE,
            },
            Chunk {
                start: PAGE_SIZE,
                size: PAGE_SIZE,
            },
        ],
        views: vec![View {
            from: at(0),
            size: 16 * PAGE_SIZE,
            prot: 3,
            at: 0x1_0000_0000,
        }],
        objects: vec![
            Pickle {
                kind: Type::Mutex as u8,
                place: at(32),
                state: vec![0; 24],
                links: vec![Link::Null],
            },
            Pickle {
                kind: Type::Ref as u8,
                place: at(64),
                state: vec![],
                links: vec![Link::Object(0)],
            },
        ],
        runs: vec![Run {
            from: at(0),
            pages: 2,
        }],
        requests: 1,
    }
}

fn file(catalogue: &Catalogue, page_count: usize) -> Vec<u8> {
    let mut body = postcard::to_allocvec(catalogue).unwrap();
    let catalogue_size = body.len();
    body.resize(catalogue_size.next_multiple_of(PAGE), 0);
    body.extend((0..page_count * PAGE).map(|n| (n / PAGE + 1) as u8));
    let size = (PAGE + body.len()) as u64;
    let header = Header::new(size, catalogue_size as u64, 5, CRC.checksum(&body));
    [&header.page(), body.as_slice()].concat()
}

#[test]
fn what_is_written_is_read() {
    let file = file(&catalogue(), 3);
    let checkpoint = Checkpoint::read(&file).unwrap();
    assert_eq!((checkpoint.clock, &checkpoint.catalogue), (5, &catalogue()));
    assert_eq!(checkpoint.source(0), [1; PAGE]);
    let (run, contents) = checkpoint.runs().next().unwrap();
    assert_eq!((run.pages, contents.len()), (2, 2 * PAGE));
    assert_eq!((contents[0], contents[PAGE]), (2, 3));
}

#[test]
fn every_truncation_and_every_flipped_bit_is_refused() {
    let mut file = file(&catalogue(), 3);
    for length in (0..PAGE + 200).chain([2 * PAGE, file.len() - 1]) {
        assert!(Checkpoint::read(&file[..length]).is_err(), "{length} bytes");
    }
    let body = PAGE..file.len();
    for at in (0..2 * PAGE).chain(body.step_by(97)) {
        for bit in 0..8 {
            file[at] ^= 1 << bit;
            assert!(Checkpoint::read(&file).is_err(), "bit {bit} of byte {at}");
            file[at] ^= 1 << bit;
        }
    }
    assert!(Checkpoint::read(&file).is_ok());
}

#[test]
fn refusals_say_why() {
    let good = file(&catalogue(), 3);
    let why = |file: &[u8]| Checkpoint::read(file).unwrap_err().to_string();
    assert_eq!(why(b""), "not a checkpoint");
    assert_eq!(why(b"\x7fELF"), "not a checkpoint");
    let size = good.len();
    assert_eq!(
        why(&good[..size - 7]),
        alloc::format!("a checkpoint cut short: {} of {size} bytes", size - 7)
    );
    let longer = [good.as_slice(), b"abc"].concat();
    assert_eq!(
        why(&longer),
        alloc::format!("a checkpoint of {size} bytes with 3 more behind it")
    );
    let mut other = good.clone();
    other[8] = 9;
    assert_eq!(
        why(&other),
        "a checkpoint of format 9; this flukevm reads format 1"
    );
    other = good;
    other[size - 1] ^= 1;
    assert_eq!(why(&other), "a damaged checkpoint: its checksum is wrong");
}

#[test]
fn nonsense_is_refused_though_its_checksum_is_right() {
    type Change = fn(&mut Catalogue);
    let changes: &[(Change, &str)] = &[
        (|c| c.given.clear(), "there is no startup block"),
        (
            |c| c.heap = 5,
            "a part of memory is no whole number of pages",
        ),
        (
            |c| c.chunks[1].start = 0,
            "the heap's memory overlaps, or is out of order",
        ),
        (|c| c.heap = PAGE_SIZE, "the heap has memory behind its end"),
        (
            |c| c.views[0].size += PAGE_SIZE,
            "a range of addresses has no memory",
        ),
        (
            |c| c.views[0].from.offset = u64::MAX,
            "a range of addresses has no memory",
        ),
        (|c| c.runs[0].pages = 3, "there are contents without memory"),
        (
            |c| c.runs[0].pages = u64::MAX,
            "there are more contents than pages",
        ),
        (
            |c| c.runs[0].from.part = Part::Source(0),
            "there are contents without memory",
        ),
        (|c| c.runs.clear(), "there are more pages than contents"),
        (
            |c| c.sources.push(PAGE_SIZE),
            "there are more contents than pages",
        ),
        (|c| c.objects[0].kind = 77, "an object has no type"),
        (|c| c.objects[0].kind = 0, "an object has no type"),
        (|c| c.objects[0].place.offset = 1, "an object has no memory"),
        (
            |c| c.objects[0].place.offset = 2 * PAGE_SIZE,
            "an object has no memory",
        ),
        (
            |c| c.objects[0].state.clear(),
            "an object has the state of another",
        ),
        (
            |c| c.objects[1].links[0] = Link::Object(1),
            "an object links to what it cannot",
        ),
        (
            |c| c.objects[0].links[0] = Link::Object(9),
            "an object links to what it cannot",
        ),
    ];
    for (change, why) in changes {
        let mut changed = catalogue();
        change(&mut changed);
        let refused = Checkpoint::read(&file(&changed, 3)).unwrap_err();
        assert_eq!(refused, Refusal::Nonsense(why));
    }
}

proptest! {
    /// Whatever the catalogue's bytes are, reading them ends, and in no panic.
    #[test]
    fn any_bytes_can_be_read(mut encoded in prop::collection::vec(any::<u8>(), 0..600), page_count in 0usize..3) {
        let catalogue_size = encoded.len();
        encoded.resize(catalogue_size.next_multiple_of(PAGE) + page_count * PAGE, 0);
        let size = (PAGE + encoded.len()) as u64;
        let header = Header::new(size, catalogue_size as u64, 0, CRC.checksum(&encoded));
        let file = [&header.page(), encoded.as_slice()].concat();
        if let Ok(checkpoint) = Checkpoint::read(&file) {
            checkpoint.runs().for_each(drop);
        }
    }
}
