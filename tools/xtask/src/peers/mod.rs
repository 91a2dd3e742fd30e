//! Peers: flukevm and other VMMs side by side, on one machine, in one run, with one guest.
//!
//! All boot the same kernel, root program and `hello`: flukevm as `run` lays them out and as `resume` finds
//! them in a snapshot, QEMU from the image that `flukevm image` writes. Every round runs each once, so what else
//! the machine does meets all alike.

mod contender;
mod measure;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{debian, lab};
use contender::Contender;
use report::{Report, Row};

/// After this time a run has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// The same in the lab, where all code is emulated.
const LIMIT_LAB: Duration = Duration::from_secs(300);
/// Time for all runs in the lab.
const LAB_TIMEOUT: Duration = Duration::from_secs(3600);

/// Options of `cargo xtask peers`.
#[derive(Args)]
#[command(after_help = "\
Measured is the time from the start of the process until the kernel tells that the first program is about to \
run (a write to its event port), until the first line of output can be read, and until the process has ended. \
Medians come with the quartiles.")]
pub struct Options {
    /// Rounds, each of which runs every VMM once
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    /// Write all times to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure in the lab, on kvm_amd
    #[arg(long)]
    lab: bool,
    /// Measure QEMU's machine pc too, whose firmware takes seconds, or a minute where KVM emulates it
    #[arg(long, conflicts_with = "lab")]
    pc: bool,
    /// In the lab: flukevm, QEMU and its firmware
    #[arg(long, hide = true, num_args = 3)]
    carried: Vec<PathBuf>,
}

/// Measures, and prints the table; returns the exit status.
pub fn run(options: &Options) -> Result<u8> {
    let (flukevm, qemu, firmware) = match &options.carried[..] {
        [flukevm, qemu, firmware] => (flukevm.clone(), qemu.clone(), firmware.clone()),
        _ => {
            let flukevm = lab::build(&lab::target_directory()?)?;
            debian::ensure_qemu()?;
            (flukevm, debian::qemu()?, contender::FIRMWARE.into())
        }
    };
    if options.lab {
        return in_lab(options, &flukevm, &qemu);
    }
    let carried = !options.carried.is_empty();
    let limit = if carried { LIMIT_LAB } else { LIMIT };
    let directory = tempfile::Builder::new()
        .prefix("flukevm-peers-")
        .tempdir()?;
    let image = directory.path().join("image");
    let snapshot = directory.path().join("snapshot");
    let out = image.to_string_lossy();
    said(&flukevm, &["image", "--out", &out, contender::PROGRAM])?;
    let to = snapshot.to_string_lossy();
    // At once: before its first instruction.
    let save = ["--snapshot-to", &to, "--snapshot-after", "0ms"];
    said(
        &flukevm,
        &[&["run"], &save[..], &[contender::PROGRAM]].concat(),
    )?;

    let mut contenders = vec![
        Contender::run(&flukevm),
        Contender::resume(&flukevm, &snapshot),
        Contender::microvm(&qemu, &firmware, &image, true),
    ];
    if options.pc {
        contenders.push(Contender::pc(&qemu, &image));
    }
    if !carried {
        contenders.push(Contender::microvm(&qemu, &firmware, &image, false));
    }
    contenders.push(Contender::version("flukevm --version", &flukevm));
    contenders.push(Contender::version("QEMU --version", &qemu));

    let load_before = report::load();
    let mut rows: Vec<Row> = contenders.into_iter().map(Row::new).collect();
    // A first run of each is not counted, and says who can be measured here at all.
    for row in &mut rows {
        row.failure = measure::run(&row.contender, limit)
            .err()
            .map(|error| format!("{error:#}"));
    }
    for row in &rows {
        if let (true, Some(why)) = (row.contender.needed, &row.failure) {
            bail!("{}: {why}", row.contender.name);
        }
    }
    let count = rows.len();
    for round in 0..options.reps as usize {
        for turn in 0..count {
            let row = &mut rows[(round + turn) % count];
            if row.failure.is_none() {
                let times = measure::run(&row.contender, limit).context(row.contender.name)?;
                row.runs.push(times);
            }
        }
    }
    let report = Report {
        host: host(&flukevm, carried)?,
        versions: [&flukevm, &qemu]
            .map(|program| said(program, &["--version"]))
            .into_iter()
            .map(|text| Ok(text?.lines().next().unwrap_or_default().to_string()))
            .collect::<Result<_>>()?,
        load: [load_before, report::load()],
        rows,
    };
    print!("{}", report.text());
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report.json())?;
        fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(0)
}

/// Measures in the lab, which gets all that is needed, and this program.
fn in_lab(options: &Options, flukevm: &Path, qemu: &Path) -> Result<u8> {
    let firmware = contender::FIRMWARE_PLACES
        .iter()
        .map(|place| Path::new(place).join(contender::FIRMWARE))
        .find(|path| path.is_file())
        .with_context(|| format!("QEMU came without {}", contender::FIRMWARE))?;
    let json = Path::new("/tmp").join(format!("flukevm-peers-{}.json", std::process::id()));
    let mut words = ["flukevm", "peers", "--reps"].map(String::from).to_vec();
    words.push(options.reps.to_string());
    words.extend([
        "--json".into(),
        json.display().to_string(),
        "--carried".into(),
    ]);
    words.extend([flukevm, qemu, &firmware].map(|path| path.display().to_string()));
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let fetch = options.json.as_ref().map(|_| json.clone());
    let status = lab::run(&lab::Options::of(program, words, fetch, LAB_TIMEOUT))?;
    if let Some(path) = options.json.as_ref().filter(|_| status == 0) {
        fs::copy(&json, path).with_context(|| format!("cannot write {}", path.display()))?;
        fs::remove_file(&json)?;
    }
    Ok(status)
}

/// What kind of host this is.
fn host(flukevm: &Path, lab: bool) -> Result<String> {
    let report = said(flukevm, &["doctor", "--json"])?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    let kernel = report["cpl0"].as_str().context("doctor says no cpl0")?;
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown CPU", |name| {
        name.trim_start_matches(['\t', ' ', ':'])
    });
    let cpus = std::thread::available_parallelism()?;
    let lab = if lab {
        "; the lab: everything is emulated, so only compare"
    } else {
        ""
    };
    Ok(format!(
        "{cpus} x {model}, KVM with {kernel} kernel code{lab}"
    ))
}

/// Runs a program; what it printed.
fn said(program: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {}: {}",
        program.display(),
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
