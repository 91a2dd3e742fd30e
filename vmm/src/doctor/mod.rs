//! The doctor: what this host's KVM can do, found by running probe guests of a few instructions.
//!
//! This is the one place that knows the host. [`gate`] answers the only question that starting
//! a machine needs, [`probe`] all of them; `flukevm doctor` prints the [`Report`]. Nothing is
//! taken from names or CPUID flags, and nothing is kept beyond the process: the same binary may
//! meet another host next time.
//!
//! * `guests`: the guests, in assembly.
//! * `machine`: the virtual machine they run in.
//! * `watchdog`: a guest that hangs is a finding, not a hang.
//! * `probes`: the questions.
//! * `report`: the answers.

mod error;
mod guests;
mod machine;
mod probes;
mod report;
mod watchdog;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use fluke_abi::boot::Gate;
use kvm_ioctls::Kvm;

pub use error::Error;
use machine::Broken;
pub use report::{Cpl0, Finding, Report};

/// An instruction at CPL 0 that takes so many times longer than one at CPL 3 is emulated.
const EMULATED_RATIO: f64 = 20.0;
/// If CPL 3 could not be measured: an instruction that takes so many nanoseconds is emulated.
const EMULATED_NS: f64 = 200.0;

/// One probe at a time, so that they do not disturb each other's measurements.
static PROBING: Mutex<()> = Mutex::new(());

/// Finds the trap gate for this host: `syscall` where it enters CPL 0 and comes back, else `ud2`.
/// Asks the host once in the life of the process.
///
/// # Errors
/// If there is no usable KVM.
pub fn gate() -> Result<Gate, Error> {
    static GATE: OnceLock<Gate> = OnceLock::new();
    let _one = PROBING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(gate) = GATE.get() {
        return Ok(*gate);
    }
    let (kvm, _) = open()?;
    let gate = choose(&probes::syscall(&kvm));
    Ok(*GATE.get_or_init(|| gate))
}

/// Whether KVM keeps translations of its own that do not follow what this process writes to the
/// guest's page tables. Asks the host once in the life of the process.
///
/// # Errors
/// If there is no usable KVM.
pub fn shadows_page_tables() -> Result<bool, Error> {
    static SHADOWS: OnceLock<bool> = OnceLock::new();
    let _one = PROBING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(shadows) = SHADOWS.get() {
        return Ok(*shadows);
    }
    let (kvm, _) = open()?;
    let shadows = probes::host_page_tables(&kvm).is_err();
    Ok(*SHADOWS.get_or_init(|| shadows))
}

/// Looks at everything. Takes about half a second, the first time in the life of the process.
///
/// # Errors
/// If there is no usable KVM. What does not work is a finding in the report, not an error.
pub fn probe() -> Result<&'static Report, Error> {
    static REPORT: OnceLock<Report> = OnceLock::new();
    let _one = PROBING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(report) = REPORT.get() {
        return Ok(report);
    }
    let report = examine()?;
    Ok(REPORT.get_or_init(|| report))
}

/// Opens KVM and sees that it makes virtual machines at all.
fn open() -> Result<(Arc<Kvm>, String), Error> {
    let (kvm, path) = machine::open()?;
    kvm.create_vm().map_err(Error::CreateVm)?;
    Ok((Arc::new(kvm), path))
}

fn choose(syscall: &Result<(), Broken>) -> Gate {
    match syscall {
        Ok(()) => Gate::Syscall,
        Err(_) => Gate::Ud2,
    }
}

/// Why something is missing, by the key of its finding.
#[derive(Default)]
struct Problems(BTreeMap<&'static str, String>);

impl Problems {
    fn value<T>(&mut self, key: &'static str, result: Result<T, Broken>) -> Option<T> {
        result
            .map_err(|why| self.0.insert(key, why.to_string()))
            .ok()
    }

    fn works<T>(&mut self, key: &'static str, result: Result<T, Broken>) -> bool {
        self.value(key, result).is_some()
    }
}

fn examine() -> Result<Report, Error> {
    let (kvm, kvm_path) = open()?;
    let mut problems = Problems::default();
    let syscall = probes::syscall(&kvm);
    let gate = choose(&syscall);
    let sse = probes::sse(&kvm);
    let no_sse_in_emulator = sse == Err(Broken::Emulation);
    let step = problems.value("single_step", probes::single_step(&kvm));
    let cpl0_ns = problems.value("cpl0_instruction_ns", probes::cpl0_instruction(&kvm));
    let cpl3_ns = problems.value("cpl3_instruction_ns", probes::cpl3_instruction(&kvm));
    let slow = match (cpl0_ns, cpl3_ns) {
        (Some(cpl0), Some(cpl3)) => cpl0 > EMULATED_RATIO * cpl3,
        (Some(cpl0), None) => cpl0 > EMULATED_NS,
        (None, _) => false,
    };
    let ud2_ns = problems.value("ud2_round_trip_ns", probes::round_trip(&kvm, Gate::Ud2));
    let syscall_ns = match gate {
        Gate::Ud2 => None,
        Gate::Syscall => problems.value(
            "syscall_round_trip_ns",
            probes::round_trip(&kvm, Gate::Syscall),
        ),
    };
    Ok(Report {
        kvm_path,
        kvm_api_version: kvm.get_api_version(),
        cpl0: if slow || no_sse_in_emulator {
            Cpl0::Emulated
        } else {
            Cpl0::Hardware
        },
        syscall_from_user: problems.works("syscall_from_user", syscall),
        gate,
        sse_at_cpl0: problems.works("sse_at_cpl0", sse),
        x2apic_timer: problems.works("x2apic_timer", probes::timer(&kvm)),
        x2apic_ipi: problems.works("x2apic_ipi", probes::ipi(&kvm)),
        single_step: step.is_some(),
        single_step_at_cpl3: problems.works("single_step_at_cpl3", probes::single_step_cpl3(&kvm)),
        hardware_breakpoints: problems.works("hardware_breakpoints", probes::breakpoints(&kvm)),
        hardware_breakpoints_at_cpl3: problems.works(
            "hardware_breakpoints_at_cpl3",
            probes::breakpoints_cpl3(&kvm),
        ),
        dirty_log: problems.works("dirty_log", probes::dirty_log(&kvm)),
        host_page_tables: problems.works("host_page_tables", probes::host_page_tables(&kvm)),
        settable_tsc: problems.works("settable_tsc", probes::tsc(&kvm)),
        max_vcpus: kvm.get_max_vcpus(),
        recommended_vcpus: kvm.get_nr_vcpus(),
        cpl0_instruction_ns: cpl0_ns,
        cpl3_instruction_ns: cpl3_ns,
        gate_round_trip_ns: match gate {
            Gate::Ud2 => ud2_ns,
            Gate::Syscall => syscall_ns,
        },
        ud2_round_trip_ns: ud2_ns,
        syscall_round_trip_ns: syscall_ns,
        pio_exit_ns: problems.value("pio_exit_ns", probes::pio_exit(&kvm, cpl0_ns)),
        single_step_ns: step,
        problems: problems.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: &str = "this test needs a usable /dev/kvm";

    #[test]
    fn the_gate_is_quick_and_the_full_report_agrees() {
        let first = gate().expect(NEED);
        let report = probe().expect(NEED);
        assert_eq!(gate().expect(NEED), first);
        assert_eq!(report.gate, first);
        assert_eq!(report.syscall_from_user, first == Gate::Syscall);
        assert!(std::ptr::eq(report, probe().expect(NEED)), "examined twice");
    }

    #[test]
    fn every_supported_host_has_what_the_kernel_and_the_inspector_need() {
        let report = probe().expect(NEED);
        let table = report.to_table();
        assert_eq!(report.kvm_api_version, 12, "{table}");
        assert!(report.single_step, "{table}");
        // QEMU's emulation of SVM, where CPL 0 is "hardware", has none.
        assert!(
            report.hardware_breakpoints || report.cpl0 == Cpl0::Hardware,
            "{table}"
        );
        assert!(report.dirty_log, "{table}");
        assert!(report.x2apic_timer, "{table}");
        assert!(report.x2apic_ipi, "{table}");
        assert!(report.max_vcpus >= report.recommended_vcpus, "{table}");
        for ns in [
            report.cpl0_instruction_ns,
            report.cpl3_instruction_ns,
            report.gate_round_trip_ns,
            report.ud2_round_trip_ns,
            report.pio_exit_ns,
            report.single_step_ns,
        ] {
            assert!(ns.is_some_and(|ns| ns > 0.0 && ns < 1e7), "{table}");
        }
    }
}
