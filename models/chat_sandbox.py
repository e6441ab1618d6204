"""A jinja2 sandbox that also bounds time and memory: everything a template does is charged to a Budget.

jinja2 compiles a template to Python, and only part of what that code does goes through methods of the environment.
So the parsed template is rewritten before it is compiled: what jinja2 would do inline (``~``, comparisons, slices,
literals, static text, the rounds of a loop) becomes a call or a charge.
"""

from collections.abc import Callable, Iterable
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .chat_budget import ITEM, Budget, refused
from .chat_filters import bounded_filters, bounded_tests
from .chat_methods import METHODS, bounded_range, raise_exception, strftime_now
from .limits import MAX_TEMPLATE_NODES

_FUNCTIONS: dict[str, Any] = {
    "dict": dict,
    "namespace": Namespace,
    "raise_exception": raise_exception,
    "range": bounded_range,
    "strftime_now": strftime_now,
}
_LOOP = frozenset({"changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length"}) | {
    "nextitem",
    "previtem",
    "revindex",
    "revindex0",
}
_OPERATORS = frozenset(("+", "-", "*", "/", "//", "**", "%"))
_EXPRESSIONS = (nodes.BinExpr, nodes.UnaryExpr, nodes.Call, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const)
_LOOKUPS = (nodes.Dict, nodes.Getattr, nodes.Getitem, nodes.List, nodes.Name, nodes.NSRef, nodes.Slice, nodes.Tuple)
_PARTS = (nodes.Filter, nodes.Keyword, nodes.Operand, nodes.Pair, nodes.Template, nodes.TemplateData, nodes.Test)
_STATEMENTS = (nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.CallBlock, nodes.Continue, nodes.FilterBlock)
_BLOCKS = (nodes.For, nodes.If, nodes.Macro, nodes.Output, nodes.Scope, nodes.With)
_ALLOWED = _EXPRESSIONS + _LOOKUPS + _PARTS + _STATEMENTS + _BLOCKS
_NODE = 8  # units, of what runs inline: a name, a condition, an assignment
_STEPS_OF_A_CALL = 4  # a macro takes so many times as long as a round of a loop, or, deep in others, longer
_REPEATED = (nodes.For, nodes.Macro, nodes.CallBlock)


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only wraps its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering, set up like the one of Hugging Face's transformers."""

    intercepted_binops = _OPERATORS

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            finalize=self.written,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._budget = budget
        self.filters = bounded_filters(budget)
        self.tests = bounded_tests(budget)  # type: ignore[assignment]
        self.globals = dict(_FUNCTIONS)

    def compiled(self, source: str) -> tuple[CodeType, frozenset[str]]:
        """The code of a template and all names in it.

        PromptError when it uses what no chat template needs, jinja2's errors otherwise.
        """
        tree = self.parse(source)
        size = _size([tree], everything=True)
        if size > MAX_TEMPLATE_NODES:
            raise refused(f"{size} names, operators and tags, at most {MAX_TEMPLATE_NODES} are allowed")
        names = frozenset(name.name for name in tree.find_all(nodes.Name))
        return self.compile(_Charging(self).visit(tree)), names

    def rendered(self, code: CodeType, variables: dict[str, Any]) -> str:
        """The text that the template makes of the variables, which are plain text, numbers, lists and dicts."""
        template = Template.from_code(self, code, self.make_globals(None))
        return "".join(template.root_render_func(template.new_context(variables)))

    # What jinja2 calls

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only what is listed, and the attributes that the template gave to a namespace itself."""
        if type(obj) in METHODS:
            return attr in METHODS[type(obj)]
        if isinstance(obj, LoopContext):
            return attr in _LOOP
        return type(obj) is Namespace and not attr.startswith("_")

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once; jinja2 would wait until the value is used."""
        raise SecurityError(f"the attribute {attribute[:40]!r} of a {type(obj).__name__} is not allowed")

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``; a key that is a tuple is hashed all the way down."""
        self._budget.charge(2 * ITEM)
        self._budget.weigh_containers(argument)
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``."""
        self._budget.charge(2 * ITEM)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left OPERATOR right``."""
        self._budget.arithmetic(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """Call what is allowed to be called, nothing else. The odd names keep clear of keyword arguments."""
        __self._budget.charge(ITEM * (1 + len(args) + len(kwargs)))
        given = (*args, *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")))
        if isinstance(__obj, BuiltinMethodType):
            __self._charge_method(__obj, given)
            result = __context.call(__obj, *args, **kwargs)
            return list(result) if type(__obj.__self__) is dict and __obj.__name__ != "get" else result
        if isinstance(__obj, MethodType) and isinstance(__obj.__self__, LoopContext):
            __self._budget.weigh(given)
        elif __obj is dict or __obj is Namespace:
            __self._budget.weigh(args)
        elif not (
            isinstance(__obj, Macro | LoopContext | Undefined)
            or (isinstance(__obj, MethodType) and __obj.__self__ is __self)
            or any(__obj is function for function in _FUNCTIONS.values())
        ):
            raise SecurityError(f"a {type(__obj).__name__} cannot be called")
        return __context.call(__obj, *args, **kwargs)

    def _charge_method(self, method: BuiltinMethodType, given: tuple[Any, ...]) -> None:
        owner = method.__self__
        cost = METHODS.get(type(owner), {}).get(method.__name__)
        if cost is None:
            raise SecurityError(f"{method.__name__!r} of a {type(owner).__name__} cannot be called")
        cost(self._budget, owner, *given)

    # What the rewritten template calls

    @pass_context
    def written(self, context: Any, value: Any) -> str:
        """The text of a value that goes into the output."""
        return self._budget.text(value)

    def tick(self, size: int, steps: int) -> bool:
        """One more round of a loop or call of a macro whose body has this many nodes; it counts as so many steps."""
        self._budget.step(steps)
        self._budget.charge(_NODE * size)
        return True

    def joined(self, *values: Any) -> str:
        """``a ~ b ~ c``."""
        return "".join(map(self._budget.text, values))

    def compared(self, left: Any, *operands: Any) -> Any:
        """``left OP right OP right ...``, as (OP, right, OP, right, ...)."""
        result: Any = True
        for name, right in zip(operands[::2], operands[1::2], strict=True):
            result = self._budget.compare(name, left, right)
            if not result:
                break
            left = right
        return result

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """``value[start:stop:step]``."""
        if isinstance(value, str | list | tuple):
            self._budget.charge(len(value) * (1 if isinstance(value, str) else ITEM))
        return value[start:stop:step]

    def made(self, value: Any) -> Any:
        """A list, tuple or dict that was written out in the template."""
        self._budget.charge(2 * ITEM * len(value))
        return value

    def key(self, value: Any) -> Any:
        """A key of a dict that is written out in the template."""
        self._budget.weigh_containers(value)
        return value


class _Charging(NodeTransformer):
    """Rewrites a parsed template so that everything it does passes through BoundedEnvironment."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node, _ALLOWED):
            raise refused(f"line {node.lineno}: {type(node).__name__.lower()} is not allowed")
        return super().visit(node, *args, **kwargs)

    def _call(self, function: Callable[..., Any], given: Iterable[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(function.__name__), list(given), [], None, None)
        call.set_lineno(line).set_environment(self._environment)
        return call

    def _constant(self, value: Any, line: int) -> nodes.Const:
        constant = nodes.Const(value)
        constant.set_lineno(line).set_environment(self._environment)
        return constant

    def _tick(self, body: list[nodes.Node], line: int, steps: int = 1) -> nodes.Call:
        given = [self._constant(number, line) for number in (_size(body), steps)]
        return self._call(self._environment.tick, given, line)

    def visit_For(self, node: nodes.For) -> nodes.For:
        tick = self._tick(node.body, node.lineno)
        filtering = None if node.test is None else self._tick([node.test], node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        if filtering is not None and node.test is not None:
            node.test = nodes.And(filtering, node.test).set_lineno(node.lineno)
        return node

    def _repeated(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        tick = self._tick(node.body, node.lineno, _STEPS_OF_A_CALL)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = _repeated

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return self._constant(node.data, node.lineno)  # jinja2 writes a constant through `written`, static text not

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call(self._environment.joined, node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Call:
        self.generic_visit(node)
        operands = [part for each in node.ops for part in (self._constant(each.op, node.lineno), each.expr)]
        return self._call(self._environment.compared, [node.expr, *operands], node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        given = [self._constant(None, node.lineno) if end is None else end for end in ends]
        return self._call(self._environment.sliced, [node.node, *given], node.lineno)

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node  # the names on the left of an assignment
        return self._call(self._environment.made, [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._call(self._environment.key, [node.key], node.lineno)
        return node


def _size(body: Iterable[nodes.Node], *, everything: bool = False) -> int:
    """How many nodes run in one round, without the bodies of inner loops and macros, which count for themselves."""
    size, stack = 0, list(body)
    while stack:
        node = stack.pop()
        size += 1
        repeated = isinstance(node, _REPEATED) and not everything
        stack.extend(node.iter_child_nodes(exclude=("body",) if repeated else None))
    return size
