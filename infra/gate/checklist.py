"""The checklist of Milestone 2.6.2, line by line."""

from infra.gate import documents, functionality, operations, security, tenancy
from infra.gate.jaeger import Jaeger
from infra.gate.performance import Benchmarks
from infra.gate.proof import HouseLine, Line, LoneLine


def make_checklist(jaeger_url: str | None = None) -> tuple[Line, ...]:
    """Every line, in the order in which it is asked for and told; the house's last line ends the house."""
    benchmarks = Benchmarks()
    jaeger = Jaeger(jaeger_url)
    return (
        HouseLine("Functionality", "Real completion through the proxy", functionality.completion),
        HouseLine("Functionality", "SSE in real time", functionality.live_stream),
        HouseLine("Functionality", "Directive in every request", functionality.directive),
        HouseLine("Functionality", "Session and checkpoint for every turn", functionality.record),
        HouseLine("Functionality", "Trace visible ≤ 500 ms", functionality.visibility),
        LoneLine("Security", "The whole matrix", security.matrix),
        HouseLine("Security", "Revoked ≤ 5 s", security.revocation),
        HouseLine("Security", "Cross-tenant refused in all cases", tenancy.refusals),
        LoneLine("Performance", "p99 overhead < 20 ms at 100 concurrent", benchmarks.overhead),
        LoneLine("Performance", "Cache hit rate > 90 %", benchmarks.cache_hits),
        LoneLine("Performance", "Streaming load (reported beside it)", benchmarks.streaming),
        HouseLine("Operations", "e2e-smoke exits 0 with a key set", operations.e2e_smoke),
        HouseLine("Operations", "All metrics visible and labelled", operations.metrics),
        HouseLine("Operations", "Spans visible at an OTLP receiver", operations.spans),
        HouseLine("Operations", "Spans visible in Jaeger", jaeger.prove),
        HouseLine("Operations", "Shutdown drains without drops", operations.shutdown),
        LoneLine("Documentation", "CURRENT_STATE.md", documents.current_state),
        LoneLine("Documentation", "DEVELOPMENT_GUIDE.md", documents.development_guide),
        LoneLine("Documentation", "ADRs 0022–0031 and their index", documents.decisions),
        LoneLine("Documentation", ".env.example complete", documents.env_example),
        LoneLine("Documentation", "Every page agrees with the code", documents.others),
        LoneLine("Release", "Tag v0.2.0", documents.tag),
    )
