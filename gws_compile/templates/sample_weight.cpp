{# The kernel of cpp_kernel.py. What depends on format, noise and scale comes as statements. #}
{% macro indented(lines, spaces) %}
{% for line in lines %}
{{ " " * spaces }}{{ line }}
{% endfor %}
{% endmacro %}
#include <torch/csrc/inductor/cpp_prefix.h>

#include <algorithm>

extern "C" {{ signature }}
{
    using Ints = at::vec::Vectorized<int32_t>;
    using Floats = at::vec::Vectorized<float>;
    constexpr int64_t size = Floats::size();
    // Blocks of a part, in whole vectors.
    constexpr int64_t max_blocks = ({{ chunk_cols // block_cols }} + size - 1) / size * size;

    const auto load = [](const {{ w_type }}* p) {
    {% if w_type == "float" %}
        return Floats::loadu(p);
    {% else %}
        return at::vec::convert<float>(at::vec::Vectorized<{{ w_type }}>::loadu(p, size));
    {% endif %}
    };
    const auto store = []({{ out_type }}* p, const Floats& y) {
    {% if w_type in ("float", out_type) %}
        const Floats& rounded = y;
    {% else %}
        const Floats rounded = at::vec::convert<float>(at::vec::convert<{{ w_type }}>(y));
    {% endif %}
    {% if out_type == "float" %}
        rounded.store(p);
    {% else %}
        at::vec::convert<{{ out_type }}>(rounded).store(p, size);
    {% endif %}
    };
    const auto prefetch = [](const {{ w_type }}* p) {
#ifdef __GNUC__
        __builtin_prefetch(p);
#endif
    };

    // A part is some of the columns ("chunk") of a row of blocks ("panel"). It is read for the maxima of its blocks, and
    // again, from the cache, for its elements.
    #pragma omp parallel for{% if threads is not none %} num_threads({{ threads }}){% endif +%}
    for (int64_t part = 0; part < {{ matrices * panels * chunks }}; ++part) {
        {% for expression, name in constants.items() %}
        const auto {{ name }} = {{ expression }};
        {% endfor %}
        {% if noise %}
        const Ints key0(key[0]), key1(key[1]), step(clock[0]), enabled(clock[1]), frozen(clock[2]);
        const Ints counting = Ints::arange(0, 1);
        {% endif %}
        const int64_t matrix = part / {{ panels * chunks }};
        const int64_t panel = part / {{ chunks }} % {{ panels }};
        const int64_t first_row = panel * {{ block_rows }};
        const int64_t first_col = part % {{ chunks }} * {{ chunk_cols }};
        const int64_t part_rows = std::min<int64_t>({{ block_rows }}, {{ rows }} - first_row);
        const int64_t part_cols = std::min<int64_t>({{ chunk_cols }}, {{ cols }} - first_col);
        const int64_t blocks = (part_cols + {{ block_cols - 1 }}) / {{ block_cols }};
        const int64_t begin = (matrix * {{ rows }} + first_row) * {{ cols }} + first_col;
        {% if of_block.values %}

        alignas(64) int32_t maxima[max_blocks] = {};
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t end = std::min<int64_t>((block + 1) * {{ block_cols }}, part_cols);
            Ints largest(0);
            for (int64_t row = 0; row < part_rows; ++row) {
                for (int64_t col = block * {{ block_cols }}; col < end; col += size) {
                    const Ints bits = at::vec::cast<int32_t>(load(w + begin + row * {{ cols }} + col));
                    largest = at::vec::maximum(largest, bits & Ints(0x7fffffff));
                }
            }
            maxima[block] = at::vec::vec_reduce_all<int32_t, 1>(
                [](Ints& x, Ints& y) { return at::vec::maximum(x, y); }, largest);
        }
        {% for name, type in of_block.types.items() %}
        alignas(64) {{ "float" if type == "Floats" else "int32_t" }} {{ name }}_of[max_blocks];
        {% endfor %}
        for (int64_t block = 0; block < blocks; block += size) {
            const Floats amax = at::vec::cast<float>(Ints::loadu(maxima + block));
            {% if learned_dims == 0 %}
            const Floats learned(learned_ptr[0]);
            {% elif learned_dims %}
            const int64_t first_block = (matrix * {{ panels }} + panel) * {{ block_columns }} + first_col / {{ block_cols }};
            const Floats learned =
                Floats::loadu(learned_ptr + first_block + block, std::min<int64_t>(size, blocks - block));
            {% endif %}
{{ indented(of_block.statements, 12) }}
            {%- for name, variable in of_block.values.items() %}
            {{ variable }}.store({{ name }}_of + block);
            {% endfor %}
        }
        {% endif %}

        // From an element to its like in the next part, for the processor to fetch.
        const int64_t ahead = first_col + part_cols < {{ cols }} ? part_cols : {{ block_rows * cols }} - first_col;
        {% if noise %}
        const int64_t first_index =
            (matrix * {{ whole_rows }} + first_row) * {{ whole_cols }} + first_col + {{ index_offset }};
        {% endif %}
        int64_t row = 0;
        {% for one in elements %}
        for (; row + {{ one.rows }} <= part_rows; row += {{ one.rows }}) {
            {% for k in range(one.rows) %}
            const int64_t row{{ k }} = begin + (row + {{ k }}) * {{ cols }};
            {% if noise %}
            const int64_t index{{ k }} = first_index + (row + {{ k }}) * {{ whole_cols }};
            {% endif %}
            {% endfor %}
            for (int64_t block = 0; block < blocks; ++block) {
                {% for name, type in of_block.types.items() %}
                const {{ type }} {{ name }}({{ name }}_of[block]);
                {% endfor %}
                const int64_t end = std::min<int64_t>((block + 1) * {{ block_cols }}, part_cols);
                for (int64_t col = block * {{ block_cols }}; col < end; col += size) {
                    {% for k in range(one.rows) %}
                    prefetch(w + row{{ k }} + ahead + col);
                    const Floats w{{ k }} = load(w + row{{ k }} + col);
                    {% if noise %}
                    const Ints element{{ k }} = Ints(static_cast<int32_t>(index{{ k }} + col)) + counting;
                    {% endif %}
                    {% endfor %}
{{ indented(one.statements, 20) }}
                    {%- for y in one.values %}
                    store(out + row{{ loop.index0 }} + col, {{ y }});
                    {% endfor %}
                }
            }
        }
        {% endfor %}
    }
}
